"""``partialfc data``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from partialfc.cli.arguments import group
from partialfc.tracking.console import console_progress, log

app = group("Make data sets.")


@app.command("glyphs")
def glyphs_command(
    out: Annotated[Path, typer.Option(help="folder to write: training set, verification/, closed_set/")],
    classes: Annotated[int, typer.Option(min=1, help="number of training characters")] = 2000,
    size: Annotated[int, typer.Option(help="image size in pixels: 32, 64 or 112")] = 32,
    fonts: Annotated[str, typer.Option(help="small (61 MB of fonts), core (about 350 MB) or all")] = "small",
    font_dir: Annotated[Path | None, typer.Option(help="folder to search for font files first")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="folder that keeps downloaded font packages")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="number of processes; default: all cores")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the contents of --out")] = False,
) -> None:
    """Draw a large-class data set from the distribution's fonts: Han characters in many typeface designs."""
    from partialfc.data.glyphs.generate import make_glyphs

    report = make_glyphs(
        out,
        classes,
        size,
        fonts,
        cache_dir=cache_dir,
        font_dir=font_dir,
        workers=workers,
        progress=console_progress,
        overwrite=overwrite,
    )
    log(
        f"{out}: {report.num_samples:,} images of {report.num_classes:,} characters in "
        f"{len(report.training_designs)} designs" + (" (existed already)" if report.reused else "")
    )
    log(
        f"{report.verification}: {report.verification_samples:,} images of {report.held_out_characters:,} other "
        f"characters, also in the held-out {', '.join(report.held_out_designs)}; "
        f"{report.look_alikes} pairs of look-alikes left out"
    )
    log(f"{report.closed_set}: {report.closed_set_samples:,} images of the training characters in held-out designs")
