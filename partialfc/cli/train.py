"""``partialfc train``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from partialfc.cli.arguments import ConfigFile, Force, Overrides
from partialfc.cli.exits import STOPPED, exit_now
from partialfc.errors import ConfigError
from partialfc.tracking.console import printable


def train_command(
    context: typer.Context,
    config: ConfigFile,
    overrides: Overrides = None,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the memory by part; compute nothing")] = False,
    ranks: Annotated[int | None, typer.Option(min=1, help="number of ranks for --dry-run (default 1)")] = None,
) -> None:
    """Train a model, alone or under torchrun.

    The classifier is sharded over all ranks: torchrun --nproc-per-node 8 -m partialfc train CONFIG key=value …
    """
    from partialfc.config import load_config

    if dry_run:
        from partialfc.planning.dry_run import dry_run as describe

        print(printable("\n".join(describe(load_config(config, overrides or []), ranks or 1))))
        return
    if ranks is not None:
        raise ConfigError(
            "--ranks belongs to --dry-run; to train on several: torchrun --nproc-per-node N -m partialfc …"
        )
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        # Read when torch is imported. Segments that grow suit sizes that change from step to step, as active rows do.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    from partialfc.runtime.process import under_torchrun
    from partialfc.runtime.timings import DEFAULT_TIMINGS
    from partialfc.train.main import train

    outcome = train(load_config(config, overrides or []), force, context.obj or DEFAULT_TIMINGS)
    # torchrun treats any other code as a failure and restarts the run; state.json holds the outcome.
    exit_now(STOPPED if outcome == "preempted" and not under_torchrun() else 0)
