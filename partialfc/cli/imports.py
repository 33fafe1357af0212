"""``partialfc import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from partialfc.cli.arguments import ConfigFile, Overrides, group

app = group("Import files that other tools have written.")


@app.command("weights")
def import_weights_command(
    config: ConfigFile,
    overrides: Overrides = None,
    backbone: Annotated[
        Path | None, typer.Option(help="backbone file: backbone.pth, model.pt, checkpoint_gpu_0.pt, …")
    ] = None,
    head: Annotated[
        Path | None, typer.Option(help="folder that holds checkpoint_gpu_*.pt or softmax_fc_gpu_*.pt")
    ] = None,
) -> None:
    """Import InsightFace weights, saved by any number of ranks, as the first checkpoint of CONFIG's run."""
    from partialfc.config import load_config
    from partialfc.exchange.import_weights import import_weights

    import_weights(load_config(config, overrides or []), backbone, head)
