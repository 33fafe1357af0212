"""``partialfc checkpoint``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from partialfc.cli.arguments import group
from partialfc.tracking.console import console_progress, log, printable

app = group("Inspect checkpoints, or merge one into a single file.")


@app.command("inspect")
def inspect_command(
    folder: Annotated[Path, typer.Argument(help="checkpoint folder, or a run folder for its newest checkpoint")],
    verify: Annotated[bool, typer.Option(help="read all files and compare their digests")] = True,
) -> None:
    """Print the contents of a checkpoint without loading it."""
    from partialfc.checkpoint.reader import describe

    for line in describe(folder, verify):
        print(printable(line))


@app.command("merge")
def merge_command(
    folder: Annotated[Path, typer.Argument(help="checkpoint folder, or a run folder for its newest checkpoint")],
    out: Annotated[Path, typer.Argument(help="safetensors file to write")],
    only: Annotated[str, typer.Option(help="only tensors whose names begin with this, e.g. head.weight")] = "",
) -> None:
    """Write the tensors of a checkpoint, unsharded, into one safetensors file."""
    from partialfc.exchange.merge import merge

    size = merge(folder, out, only, console_progress)
    log(f"{out}: {size / 2**20:,.1f} MiB")
