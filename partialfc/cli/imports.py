"""``partialfc import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from partialfc.cli.arguments import ConfigFile, Overrides, group
from partialfc.errors import ConfigError
from partialfc.files import write_atomically
from partialfc.tracking.console import log

app = group("Import files that other tools have written.")


@app.command("config")
def import_config_command(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.py", help="file such as arcface_torch/configs/ms1mv3_r50.py")
    ],
    out: Annotated[Path | None, typer.Option(help="YAML file to write; default: print it")] = None,
    gpus: Annotated[int, typer.Option(min=1, max=1 << 16, help="GPUs of that run: its batch_size is one GPU's")] = 8,
) -> None:
    """Import a config of InsightFace's arcface_torch, without executing it, and list what has no counterpart."""
    from partialfc.exchange.import_config import import_config

    text, notes = import_config(config, gpus)
    if out is None:
        print(text, end="")
        return
    if out.exists():
        raise ConfigError(f"--out: {out} exists; choose another file")
    try:
        write_atomically(out, text)
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be written: {error.strerror}") from error
    for note in notes:
        log(note)
    log(f"{out} written; the command to train: partialfc train {out}")


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
