"""``partialfc data``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from partialfc.cli.arguments import Workers, group
from partialfc.cli.convert import convert_command
from partialfc.errors import ConfigError, InvalidData
from partialfc.tracking.console import console_progress, format_bytes, log, printable

app = group("Make data sets, look at them, and check them.")

Source = Annotated[
    list[str], typer.Argument(metavar="SET", help="data set folder, or shards of one set: folder, files, pattern")
]


@app.command("glyphs")
def glyphs_command(
    out: Annotated[Path, typer.Option(help="folder to write: training set, verification/, closed_set/")],
    classes: Annotated[int, typer.Option(min=1, help="number of training characters")] = 2000,
    size: Annotated[int, typer.Option(help="image size in pixels: 32, 64 or 112")] = 32,
    fonts: Annotated[str, typer.Option(help="small (61 MB of fonts), core (about 350 MB) or all")] = "small",
    font_dir: Annotated[Path | None, typer.Option(help="folder to search for font files first")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="folder that keeps downloaded font packages")] = None,
    workers: Workers = None,
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


app.command("convert")(convert_command)


@app.command("inspect")
def inspect_command(
    source: Source,
    sheet: Annotated[Path | None, typer.Option(help="PNG to draw: images of random classes")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the choice of classes and images")] = 0,
) -> None:
    """Show classes, samples per class, image sizes and modes, and shards of a set."""
    from partialfc.data.dataset import TarDataset
    from partialfc.data.inspect import count_samples, describe_set, draw_sheet

    dataset = TarDataset(_as_set(source), console_progress)
    counts = count_samples(dataset)
    for line in describe_set(dataset, counts, seed):
        print(printable(line))
    if sheet is not None:
        try:
            classes = draw_sheet(dataset, counts, sheet, seed)
        except OSError as error:
            raise ConfigError(f"--sheet: {sheet} cannot be written: {error.strerror or error}") from error
        print(f"{sheet}: images of {classes} classes")


@app.command("verify")
def verify_command(
    source: Source,
    max_pixels: Annotated[int, typer.Option(min=1, help="of an image, as data.max_pixels")] = 40_000_000,
    workers: Workers = None,
) -> None:
    """Check sizes, digests, labels, class table and every image of a set: code 0 all is well, 2 there are problems."""
    from partialfc.data.plain import describe
    from partialfc.data.verify import verify

    found = verify(_as_set(source), max_pixels, workers, console_progress)
    for problem in found.problems.found:
        print(printable(problem))
    looked_at = f"{found.num_samples:,} samples in {found.num_shards:,} shards, {format_bytes(found.num_bytes)}"
    if found.problems.count:
        listed = f", the first {len(found.problems.found)} above" if found.problems.count > 1 else ", above"
        raise InvalidData(f"{describe(_as_set(source))}: {found.problems.count:,} problems{listed}; read: {looked_at}")
    log(f"{looked_at}: all is well")


def _as_set(source: list[str]) -> str | list[str]:
    return source[0] if len(source) == 1 else source
