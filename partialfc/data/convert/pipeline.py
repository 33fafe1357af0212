"""Conversion of a source into a data set folder: listed, planned, written shard by shard, completed.

What is finished stays in ``OUT/.convert`` until the set is complete; a conversion that was stopped goes on from there.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from partialfc.data.convert.images import ImageSettings
from partialfc.data.convert.listing import Listing, describe_skipped, make_listing
from partialfc.data.convert.plan import Plan, Selection, make_plan
from partialfc.data.convert.provenance import describe_selection, describe_source, require_apart
from partialfc.data.convert.sets import SetInProgress
from partialfc.data.convert.shards import Bad, write_shard
from partialfc.data.convert.source import Source
from partialfc.data.convert.workspace import BAD, PROTOCOL, VERIFICATION, Workspace
from partialfc.data.pool import Pool
from partialfc.errors import DataError, DataUnavailable, InvalidData
from partialfc.files import write_atomically
from partialfc.tracking.console import Progress, format_bytes, log, no_progress

_BYTES_BESIDE = 3 * 512 + 256  # of a sample in a tar: two headers, the label, and the padding
_SHOWN = 20  # bad images in a message
_ALL_PAIRS = {"holdout": {"probe": "all", "gallery": "all"}}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a conversion does.

    Attributes:
        selection: which records are taken, and their classes.
        images: what becomes of images.
        samples_per_shard: of all shards but the last.
        max_bad: share of images that may be unreadable before the conversion fails.
    """

    selection: Selection = field(default_factory=Selection)
    images: ImageSettings = field(default_factory=ImageSettings)
    samples_per_shard: int = 10_000
    max_bad: float = 0.001


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion has made."""

    num_samples: int
    num_classes: int
    num_bad: int
    verification_samples: int
    verification_classes: int


def convert(
    source: Source,
    origin: Path,
    out: Path,
    options: Options,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ConvertReport:
    """Convert a source into a data set folder.

    Args:
        origin: file or folder that the source was opened from.
        workers: number of processes; default: one a core. The result is the same with any.
        overwrite: replace a data set, or an unfinished one, in ``out``.

    Raises:
        DataError: the source is damaged or cannot be read, too many images are bad, or ``out`` cannot be written.
        ConfigError: options that do not fit the source.
    """
    require_apart(origin, options.selection, out)
    recorded = {
        "selection": describe_selection(options.selection),
        "images": asdict(options.images),
        "samples_per_shard": options.samples_per_shard,
    }
    job = {"source": [source.kind, os.path.abspath(origin), source.fingerprint()], **recorded}
    with _writing(out), Workspace(out, job, overwrite) as workspace, Pool(workers) as pool:
        listing = Listing.open(workspace.listing) or make_listing(source, workspace.listing, pool, progress)
        plan = make_plan(listing, options.selection, workspace.folder)
        for remark in _remarks(source, listing, plan):
            log(remark)
        planned = [("training", plan.training, out), ("verification", plan.verification, out / VERIFICATION)]
        sets = [
            SetInProgress.begin(
                source, listing, each, folder, workspace.results(name), options.samples_per_shard, options.images
            )
            for name, each, folder in planned
            if each
        ]
        _require_space(out, _bytes_to_write(origin, source, listing, sets), options.images)
        _write_shards(sets, options.max_bad, out, pool, progress)
        extra = {"source": describe_source(source.kind, origin), "options": recorded}
        if plan.verification:
            write_atomically(out / VERIFICATION / PROTOCOL, json.dumps(_ALL_PAIRS, indent=1))
        for each in reversed(sets):  # the training set last: its index completes the whole
            each.complete(extra)
        workspace.finish()
    training, held_out = sets[0], sets[1] if plan.verification else None
    return ConvertReport(
        num_samples=training.num_samples(),
        num_classes=len(plan.training.names),
        num_bad=sum(len(each.bad()) for each in sets),
        verification_samples=held_out.num_samples() if held_out else 0,
        verification_classes=len(held_out.plan.names) if held_out else 0,
    )


def _remarks(source: Source, listing: Listing, plan: Plan) -> Iterator[str]:
    """Yield what the user may not expect of the source or of the lists."""
    yield f"{len(listing.rows):,} images of {listing.num_identities:,} identities"
    if listing.skipped:
        yield f"left out: {describe_skipped(listing.skipped)}"
    for what, said, found in (
        ("images", source.num_records(), len(listing.rows)),
        ("identities", source.num_identities(), listing.num_identities),
    ):
        if said not in (None, found):
            yield f"warning: the source says that it has {said:,} {what}, but {found:,} were found; is it complete?"
    for remark in plan.remarks:
        yield f"warning: {remark}"


def _write_shards(sets: list[SetInProgress], max_bad: float, out: Path, pool: Pool, progress: Progress) -> None:
    """Write what is missing.

    Raises:
        InvalidData: too many images are bad.
    """
    total = sum(each.plan.num_records for each in sets)
    done = sum(each.records_done() for each in sets)
    if done:
        log(f"going on after {done:,} of {total:,} images")
    most = int(max_bad * total)
    num_bad = sum(len(each.bad()) for each in sets)
    missing = [(each, number) for each in sets for number in each.missing()]
    with progress("converting", total, done) as advance:
        written = pool.map(write_shard, [(each.job, number) for each, number in missing])
        for (each, number), result in zip(missing, written, strict=True):
            each.results[number] = result
            num_bad += len(result.bad)
            advance(each.records_of(number), note=f"{num_bad:,} bad" if num_bad else "")
            if num_bad > most:
                break
    bad = [found for each in sets for found in each.bad()]
    if bad:
        _write_bad(out / BAD, bad)
    if len(bad) > most:
        shown = "".join(f"\n  {found.key}: {found.reason}" for found in bad[:_SHOWN])
        raise InvalidData(
            f"{len(bad):,} images so far cannot be used, more than the {most:,} that --max-bad {max_bad:g} allows; all "
            f"are listed in {out / BAD}. Raise --max-bad to go on without them; or mend them, or give a copy of that "
            f"list to --exclude, and begin anew with --overwrite:{shown}"
        )


def _write_bad(path: Path, bad: list[Bad]) -> None:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["key", "reason"])
    rows.writerows([found.key, found.reason] for found in bad)
    write_atomically(path, text.getvalue())


def _bytes_to_write(origin: Path, source: Source, listing: Listing, sets: list[SetInProgress]) -> int:
    """Estimate the bytes still to be written, if images keep their bytes."""
    left = sum(each.plan.num_records - each.records_done() for each in sets)
    if source.in_blocks:  # sizes of records are not known then
        files = origin.rglob("*") if origin.is_dir() else [origin]
        stored = sum(path.stat().st_size for path in files if path.is_file())
    else:
        stored = listing.num_bytes
    return stored * left // len(listing.rows) + left * _BYTES_BESIDE


def _require_space(out: Path, needed: int, images: ImageSettings) -> None:
    free = shutil.disk_usage(out).free
    if images.resize is None and needed > free:  # resized images have other sizes
        raise DataError(f"{out}: about {format_bytes(needed)} are to be written, but {format_bytes(free)} are free")


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Say in words what the system says of the target; of sources, only DataErrors come this way."""
    try:
        yield
    except OSError as error:
        where = error.filename or out
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataUnavailable(
                f"{where}: the disk is full; free some space and give the same command again: finished shards stay"
            ) from error
        raise DataUnavailable(f"{where} cannot be written: {error.strerror}") from error
