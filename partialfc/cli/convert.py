"""``partialfc data convert``."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from partialfc.cli.arguments import Workers
from partialfc.cli.exits import STOPPED, fail
from partialfc.errors import ConfigError, Interrupted
from partialfc.tracking.console import console_progress, log

if TYPE_CHECKING:
    from partialfc.data.convert.images import ImageSettings


def convert_command(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="file or folder, or a pattern of tars")],
    out: Annotated[Path, typer.Option(help="folder to write the data set to")],
    format: Annotated[
        str | None,
        typer.Option(help="recordio, folders, manifest, parquet, webdataset or pairs; default: told by its looks"),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="folder of the images that a table or a list names")] = None,
    image_field: Annotated[str | None, typer.Option(help="column of the images; in tars their extension")] = None,
    label_field: Annotated[
        str | None, typer.Option(help="column of the identities; in tars an extension, or a field of the .json")
    ] = None,
    key_field: Annotated[str | None, typer.Option(help="column of the samples' keys; default: made from paths")] = None,
    split: Annotated[str | None, typer.Option(help="of a Hugging Face data set; default: train")] = None,
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
    workers: Workers = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the data set in --out")] = False,
) -> None:
    """Make a data set of images and their identities, or a verification set of pairs (.bin, pairs.txt and others).

    Stopped, the same command goes on.
    """
    from partialfc.data.convert.detect import PAIRS, SourceOptions, open_source, origin_of
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
    settings = ImageSettings(decode=decode, resize=resize, fit=fit)
    reading = SourceOptions(
        images=images, image_field=image_field, label_field=label_field, key_field=key_field, split=split
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = Options(selection=selection, images=settings, samples_per_shard=samples_per_shard, max_bad=max_bad)
    if format == PAIRS or (format is None and is_pair_set(source)):
        unused = options != Options(images=settings) or reading != SourceOptions(images=images) or workers is not None
        if unused:
            raise ConfigError(
                f"{source} is a set of pairs: it is converted as a whole, without a choice of its records; it takes "
                "--images, --resize, --fit and --overwrite"
            )
        _convert_pairs(source, out, images, settings, overwrite)
        return
    try:
        opened = open_source(source, format, reading)
        report = convert(opened, origin_of(source), out, options, workers, overwrite, console_progress)
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
