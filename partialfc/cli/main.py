"""The command ``partialfc``, assembled from its verbs."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer

import partialfc
from partialfc.cli import checkpoint, data, imports, launch, runs
from partialfc.cli.arguments import group
from partialfc.cli.config import config_command
from partialfc.cli.evaluate import evaluate_command
from partialfc.cli.exits import fail
from partialfc.cli.export import export_command
from partialfc.cli.train import train_command
from partialfc.errors import PartialFCError
from partialfc.runtime.timings import Timings

app = group("Train classifiers with very many classes, the classifier sharded over ranks.")
app.command("train")(train_command)
app.command("evaluate")(evaluate_command)
app.command("config")(config_command)
app.command("export")(export_command)
app.add_typer(data.app, name="data")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(imports.app, name="import")
app.add_typer(runs.app, name="runs")
app.add_typer(launch.app, name="launch")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"partialfc {partialfc.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Accept options before the verb."""


def main(arguments: Sequence[str] | None = None, timings: Timings | None = None) -> None:
    """Run the command, with ``sys.argv`` by default, and end the process; ``timings`` are those of a training.

    Exit codes: 0 finished, 1 failed (the last line says why), 2 wrong usage, config or data, 75 stopped on request with
    a checkpoint written.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names and messages may have what the locale's encoding lacks. The last step of this is to ask for the position
        # in a file, which has become a pipe if the process was forked for the command.
        with suppress(OSError):
            sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(arguments, obj=timings)
    except PartialFCError as error:
        fail(error, error.exit_code)
