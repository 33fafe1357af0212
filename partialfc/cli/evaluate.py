"""``partialfc evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from partialfc.cli.exits import STOPPED, exit_now, leave_to_launcher
from partialfc.errors import PartialFCError


def evaluate_command(
    run: Annotated[Path, typer.Argument(help="run folder")],
    sets: Annotated[
        list[Path] | None, typer.Option("--set", help="evaluation set; default: the sets of the run's config")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="confirm the run's model.name if it is not built in: its code is executed")
    ] = None,
) -> None:
    """Evaluate the newest checkpoint of a run, alone or under torchrun."""
    from partialfc.evaluate.saved_run import evaluate
    from partialfc.runtime.process import under_torchrun

    try:
        results = evaluate(run, sets or [], model)
    except PartialFCError as error:
        leave_to_launcher(error, error.exit_code)
        raise
    exit_now(STOPPED if results is None and not under_torchrun() else 0)
