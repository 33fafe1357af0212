"""One shard of a conversion: its records read, checked and written, by whichever process takes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt

from partialfc.data.convert.images import ImageSettings, prepare
from partialfc.data.convert.listing import Listing
from partialfc.data.convert.source import Record, Source, Unreadable, fit_key
from partialfc.data.permutation import epoch_permutation
from partialfc.data.writer import ShardWriter, shard_name
from partialfc.errors import DataError
from partialfc.files import read_json, sync_to_disk, write_atomically

SEED = 0  # of the shuffle
_MAX_RESULT_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """What the shards of a set have in common.

    Attributes:
        listing: folder of the listing.
        records: file of the numbers of the set's records, int64; in blocks shuffled already where the source has some.
        labels: file of the class id of each identity, int32.
        num_records: of the set.
        folder: to write the shards to.
        results: folder of what is known of finished shards.
    """

    source: Source
    listing: Path
    records: Path
    labels: Path
    num_records: int
    folder: Path
    results: Path
    samples_per_shard: int
    images: ImageSettings

    @property
    def num_shards(self) -> int:
        """Number of shards, some of which may turn out to have no readable image."""
        return -(-self.num_records // self.samples_per_shard)


@dataclass(frozen=True, slots=True)
class Bad:
    """A record whose image cannot be used."""

    identity: int  # its number in the listing
    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What became of a shard's records.

    Attributes:
        entry: of the shard in the index; None if no image could be used, and there is no file.
    """

    entry: dict[str, Any] | None
    bad: list[Bad]


def read_result(job: ShardJob, number: int) -> ShardResult | None:
    """Return what a shard has become; None if it is not finished, or damaged since: it can be written again."""
    try:
        content = read_json(_result_path(job, number), _MAX_RESULT_BYTES)
        entry = content["entry"]
        if entry and (job.folder / entry["url"]).stat().st_size != entry["nbytes"]:
            return None
        return ShardResult(entry, [Bad(*bad) for bad in content["bad"]])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def write_shard(job: ShardJob, number: int) -> ShardResult:
    """Write a shard, and then its result: equal bytes in any process and at any time.

    Raises:
        DataError: the source cannot be read.
        OSError: the shard cannot be written.
    """
    listing = Listing.open(job.listing)
    if listing is None:
        raise DataError(f"{job.listing} is gone; was it removed?")
    numbers = _record_numbers(job, number)
    records = listing.records(numbers)
    identities = listing.rows["identity"][numbers].tolist()
    labels = np.memmap(job.labels, np.int32, mode="r")
    bad = list[Bad]()
    writer = ShardWriter(job.folder / shard_name(number))
    try:
        for i, image in _in_order(job, number, records):
            prepared = image if isinstance(image, Unreadable) else prepare(image, job.images)
            if isinstance(prepared, Unreadable):
                bad.append(Bad(identities[i], records[i].key, prepared.reason))
            else:
                writer.write(_new_key(records[i].key, writer), *prepared, int(labels[identities[i]]))
        entry = writer.close() if writer.num_samples else None
    finally:
        writer.discard()
    with suppress(OSError):  # some file systems cannot sync a folder
        sync_to_disk(job.folder)
    result = ShardResult(entry, bad)
    content = {"entry": entry, "bad": [[each.identity, each.key, each.reason] for each in bad]}
    write_atomically(_result_path(job, number), json.dumps(content))
    return result


def _result_path(job: ShardJob, number: int) -> Path:
    return job.results / f"{number:06d}.json"


def _record_numbers(job: ShardJob, number: int) -> npt.NDArray[np.int64]:
    """Return the numbers of the records of a shard, in the order of reading."""
    start = number * job.samples_per_shard
    places = np.arange(start, min(start + job.samples_per_shard, job.num_records), dtype=np.int64)
    if not job.source.in_blocks:
        places = epoch_permutation(places, job.num_records, SEED, epoch=0)
    found: npt.NDArray[np.int64] = np.memmap(job.records, np.int64, mode="r")[places]
    return found


def _in_order(job: ShardJob, number: int, records: Sequence[Record]) -> Iterator[tuple[int, bytes | Unreadable]]:
    """Yield the images in the order of writing, each with the place of its record in ``records``.

    Blocks are read one after another and written mixed; between these, the images lie in a file.
    """
    images = job.source.read(records)
    if not job.source.in_blocks:
        yield from enumerate(images)
        return
    with TemporaryFile(dir=job.results) as spool:
        stored = list[Unreadable | tuple[int, int]]()
        for image in images:
            stored.append(image if isinstance(image, Unreadable) else (spool.tell(), len(image)))
            if not isinstance(image, Unreadable):
                spool.write(image)
        for i in epoch_permutation(np.arange(len(stored)), len(stored), SEED, epoch=number).tolist():
            place = stored[i]
            if isinstance(place, Unreadable):
                yield i, place
            else:
                spool.seek(place[0])
                yield i, spool.read(place[1])


def _new_key(key: str, writer: ShardWriter) -> str:
    """Return a key as it is or, if the shard has it already, with a number."""
    found, number = key, 2
    while found in writer:
        found, number = fit_key(f"{key}~{number}"), number + 1
    return found
