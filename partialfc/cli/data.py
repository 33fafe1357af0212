"""``partialfc data``."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from partialfc.cli.arguments import group
from partialfc.cli.exits import STOPPED, fail
from partialfc.errors import ConfigError, Interrupted
from partialfc.tracking.console import console_progress, log

if TYPE_CHECKING:
    from partialfc.data.convert.images import ImageSettings

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


@app.command("convert")
def convert_command(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="folder or file of images and identities")],
    out: Annotated[Path, typer.Option(help="folder to write the data set to")],
    format: Annotated[
        str | None,
        typer.Option(help="recordio, folders, manifest, parquet, webdataset or pairs; default: told by its looks"),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="folder of the image files that a table or list of pairs names")
    ] = None,
    image_field: Annotated[str | None, typer.Option(help="column or extension of the image")] = None,
    label_field: Annotated[str | None, typer.Option(help="column, extension or JSON field of the identity")] = None,
    key_field: Annotated[str | None, typer.Option(help="column of the key")] = None,
    split: Annotated[str | None, typer.Option(help="split of a Parquet data set; default: train")] = None,
    resize: Annotated[int | None, typer.Option(min=1, help="pixels of a side; default: bytes are kept")] = None,
    fit: Annotated[str, typer.Option(help="with --resize: squash to a square, or keep the aspect")] = "squash",
    decode: Annotated[bool, typer.Option("--decode", help="decode every image to see whether that works")] = False,
    classes: Annotated[Path | None, typer.Option(help="classes.jsonl of an earlier set, whose ids stay")] = None,
    exclude: Annotated[Path | None, typer.Option(help="CSV with a column key or identity: left out")] = None,
    merge: Annotated[Path | None, typer.Option(help="CSV with columns identity,into: become one class")] = None,
    min_samples: Annotated[int, typer.Option(min=1, help="identities with fewer images are left out")] = 1,
    max_samples: Annotated[int | None, typer.Option(min=1, help="images taken of an identity at most")] = None,
    holdout: Annotated[int, typer.Option(min=0, help="identities set aside in OUT/verification")] = 0,
    max_bad: Annotated[float, typer.Option(min=0, max=1, help="share of images that may be unreadable")] = 0.001,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="images in a tar file")] = 10_000,
    workers: Annotated[int | None, typer.Option(min=1, help="number of processes; default: all cores")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the data set in --out")] = False,
) -> None:
    """Make a data set of RecordIO, folders, tables or WebDataset tars, or a verification set of pairs.

    Stopped, the same command goes on.
    """
    from partialfc.data.convert.detect import SourceOptions, open_source
    from partialfc.data.convert.images import ImageSettings
    from partialfc.data.convert.pair_set import is_pair_set
    from partialfc.data.convert.pipeline import Options, convert
    from partialfc.data.convert.plan import Selection

    selection = Selection(
        classes=classes,
        exclude=exclude,
        merge=merge,
        min_samples=min_samples,
        max_samples=max_samples,
        holdout=holdout,
    )
    options = Options(
        selection=selection,
        images=ImageSettings(decode=decode, resize=resize, fit=fit),
        samples_per_shard=samples_per_shard,
        max_bad=max_bad,
    )
    told = SourceOptions(
        images=images, image_field=image_field, label_field=label_field, key_field=key_field, split=split
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if format == "pairs" or (format is None and is_pair_set(source)):
        if selection != Selection() or told != SourceOptions(images=images):
            raise ConfigError(
                f"{source} is a set of pairs: it is converted as a whole, without a choice of its records"
            )
        _convert_pairs(source, out, images, options.images, overwrite)
        return
    try:
        opened = open_source(source, format, told)
        report = convert(opened, source, out, options, workers, overwrite, console_progress)
    except KeyboardInterrupt:
        fail(Interrupted("stopped; finished shards stay, and the same command goes on from there"), STOPPED)
    log(
        f"{out}: {report.num_samples:,} images of {report.num_classes:,} classes"
        + (f"; {report.num_bad:,} could not be used, see {out / 'bad.csv'}" if report.num_bad else "")
    )
    if holdout:
        log(
            f"{out / 'verification'}: {report.verification_samples:,} images of {report.verification_classes:,} other "
            "identities"
        )


def _convert_pairs(source: Path, out: Path, images: Path | None, settings: ImageSettings, overwrite: bool) -> None:
    from partialfc.data.convert.pair_set import convert_pairs

    try:
        report = convert_pairs(source, out, images, settings, overwrite, console_progress)
    except KeyboardInterrupt:
        fail(Interrupted("stopped; nothing is complete yet, and the same command starts again"), STOPPED)
    log(
        f"{out}: {report.pairs:,} pairs in {report.folds} folds, {report.genuine:,} of the same identity; "
        f"{report.stored:,} images" + (f" ({report.images:,} with equal ones)" if report.stored < report.images else "")
    )
    if report.contradictions:
        log(
            f"WARNING: {report.contradictions:,} pairs are of different identities by the list, while its other pairs "
            "make them one"
        )
