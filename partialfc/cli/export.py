"""``partialfc export``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from partialfc.tracking.console import console_progress, log


class CenterDtype(StrEnum):
    """Floating-point type of exported class centres."""

    float32 = "float32"
    float16 = "float16"


def export_command(
    run: Annotated[Path, typer.Argument(help="run folder, or one of its checkpoints")],
    out: Annotated[Path | None, typer.Option(help="folder to write; default: export in the run folder")] = None,
    centers: Annotated[
        bool, typer.Option("--centers", help="also export the class centres and their class table")
    ] = False,
    center_dtype: Annotated[CenterDtype, typer.Option(help="type of the class centres")] = CenterDtype.float32,
    onnx: Annotated[bool, typer.Option(help="write an ONNX file and check it against torch")] = True,
    model: Annotated[
        str | None, typer.Option(help="confirm the run's my.module:factory or timm:NAME: its code is executed")
    ] = None,
) -> None:
    """Export the backbone as safetensors and ONNX and, on request, the class centres."""
    from partialfc.config import load_config
    from partialfc.exchange.export import export
    from partialfc.tracking.wandb.run import sync_pending

    done = export(run, out, centers, center_dtype.value, onnx, console_progress, model)
    checked = "" if done.onnx_difference is None else f"; ONNX as torch within {done.onnx_difference:.0e}"
    log(f"{done.folder}, from {done.checkpoint.name}: {', '.join(done.files)}{checked}")
    folder = done.checkpoint.parent.parent
    if (folder / "config.yaml").exists():
        sync_pending(folder, load_config(folder / "config.yaml").tracking.wandb)
