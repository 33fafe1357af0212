"""``partialfc runs``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from partialfc.cli.arguments import Group, group
from partialfc.tracking.console import log


class FolderOrCommand(Group):
    """Group whose command ``list`` is optional: ``partialfc runs DIR`` is ``partialfc runs list DIR``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["list", *args]
        return super().parse_args(ctx, args)


app = group("Show the state of runs (partialfc runs DIR), or send one to W&B.", FolderOrCommand)


@app.command("list")
def list_command(
    folder: Annotated[Path, typer.Argument(help="run folder, or a folder above run folders, e.g. runs")],
    watch: Annotated[bool, typer.Option("--watch", help="refresh until Ctrl-C")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="seconds between refreshes")] = 5.0,
) -> None:
    """Show state, step, ETA and last metrics of runs. The word `list` is optional."""
    from partialfc.runs.listing import describe_runs, watch_runs

    if watch:
        watch_runs(folder, every)
    else:
        print(describe_runs(folder))


@app.command("sync")
def sync_command(
    folder: Annotated[Path, typer.Argument(help="run folder")],
) -> None:
    """Send the rows of a run that W&B lacks, after the run was offline or the server unreachable."""
    from partialfc.runs.sync import sync

    log(f"{folder}: " + ("sent the missing rows" if sync(folder) else "nothing to send"))
