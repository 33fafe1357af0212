"""Making of ``samples.index``: one walk over the headers of all shards, in several processes."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO
from zlib import crc32

import numpy as np

from partialfc.data.index import INDEX
from partialfc.data.offsets import (
    FORMAT,
    HEADER_BYTES,
    SAMPLES_A_CHECK,
    IndexedSet,
    Integers,
    Layout,
    entries_check,
    header_digest,
    stamps_of,
)
from partialfc.data.pool import Pool
from partialfc.data.samples import class_id, walk_samples
from partialfc.data.tar import BLOCK
from partialfc.errors import DataUnavailable, InvalidData
from partialfc.files import open_new
from partialfc.tracking.console import Progress

_ALONE_BYTES = 1 << 28  # of shards that one process walks before others would have started
_MAX_NAME_BYTES = 255
_LARGEST = 2**32 - 1
_PIECE = 1 << 20  # samples, or bytes
_EMPTY_CLASSES = 1_000_000, 100  # at most so many, and so many for each sample, when ids are taken as they are
_MIXED = "a set's labels must be class ids in all shards, or names in all; `partialfc data convert` numbers any"


@dataclass(frozen=True)
class ShardEntries:
    """What an index holds of a shard.

    Attributes:
        names: the classes that ``labels`` count, in order of appearance; None: labels are class ids.
        key_ends: from the shard's first key on.
    """

    labels: Integers
    names: list[str] | None
    places: Any  # uint32 [samples, 2]
    key_ends: Integers
    keys: bytes


def read_shard(path: Path, num_classes: int | None) -> ShardEntries:
    """Walk over the headers of a shard.

    Args:
        num_classes: of the set; None: labels may be ids of any classes, or names.

    Raises:
        InvalidData: the shard is damaged or hostile, or a label is none of the set's.
        DataUnavailable: it cannot be read.
    """
    labels, places, key_ends, keys = array("q"), array("I"), array("q"), bytearray()
    names: dict[bytes, int] = {}
    try:
        for key, label, offset, size in walk_samples(path):
            if max(offset // BLOCK, size) > _LARGEST:
                raise InvalidData(f"{path}: sample {key!r} is larger than 4 GiB, or begins after 2 TiB")
            number = class_id(label)
            if num_classes is not None and (number is None or number >= num_classes):
                raise InvalidData(
                    f"{path}: sample {key!r} has label {label[:40].decode(errors='replace')}, "
                    f"but the data set has classes 0..{num_classes - 1}"
                )
            if labels and (number is None) != bool(names):
                raise InvalidData(f"{path}: sample {key!r} has label {label[:40]!r}: {_MIXED}")
            labels.append(names.setdefault(label, len(names)) if number is None else number)
            places.append(offset // BLOCK)
            places.append(size)
            keys += key.encode()
            key_ends.append(len(keys))
    except OSError as error:
        raise DataUnavailable(f"{path} cannot be read: {error.strerror}") from error
    return ShardEntries(
        np.array(labels, dtype=np.int64),
        [_class_name(name, path) for name in names] or None,
        np.array(places, dtype=np.uint32).reshape(-1, 2),
        np.array(key_ends, dtype=np.int64),
        bytes(keys),
    )


def _class_name(name: bytes, path: Path) -> str:
    try:
        text = name.decode()
    except UnicodeDecodeError:
        text = ""
    if not text.isprintable() or not text or len(name) > _MAX_NAME_BYTES:
        raise InvalidData(f"{path}: label {name[:40]!r} is neither a class id in decimal nor the name of a class")
    return text


@dataclass(frozen=True)
class Classes:
    """Classes that were found in a set without a class table."""

    names: list[str] | None  # by class id; None: classes are called by their ids
    samples: Integers  # of each class, int64 [classes]


def write_index(path: Path, indexed: IndexedSet, progress: Progress, alive: Callable[[], None]) -> Classes:
    """Index a set into a new file. Memory is bounded, but for names of classes, whatever the number of samples.

    Args:
        alive: called after each shard.

    Raises:
        InvalidData: a shard is damaged or hostile, or holds other samples than the set's own index says.
        DataUnavailable: a shard cannot be read.
        OSError: the file cannot be written.
    """
    with ExitStack() as stack:
        sections: list[IO[bytes]] = [stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) for _ in range(4)]
        counts, names, num_classes = _collect(indexed, sections, progress, alive)
        layout = Layout(len(indexed.shards), sum(counts), sections[3].tell())
        ids = None if names is None else _sorted_ids(names)
        file = stack.enter_context(open_new(path))
        file.write(bytes(HEADER_BYTES) + stamps_of(indexed.shards, counts).tobytes() + bytes(8 * layout.num_checks))
        for section in sections:
            section.seek(0)
        for piece in iter(lambda: sections[0].read(8 * _PIECE), b""):
            labels = np.frombuffer(piece, "<i8")
            file.write((labels if ids is None else ids[labels]).data)
            alive()
        for section in sections[1:]:
            shutil.copyfileobj(section, file, _PIECE)
            alive()
        file.flush()
        return _complete(file, path, indexed, layout, num_classes, names)


def _collect(
    indexed: IndexedSet, sections: list[IO[bytes]], progress: Progress, alive: Callable[[], None]
) -> tuple[list[int], list[str] | None, int]:
    """Write labels, places, key ends and keys of all shards into ``sections``.

    Returns:
        samples of each shard, names that the labels count, if they are names, number of classes.
    """
    counts: list[int] = []
    places: dict[str, int] = {}
    largest, key_bytes, shards = -1, 0, indexed.shards
    total = len(shards) if indexed.num_samples is None else sum(indexed.num_samples)
    with progress(f"indexing {indexed.name}", total) as advance:
        for shard, entries in zip(shards, _read_shards(indexed), strict=True):
            expected = indexed.num_samples[len(counts)] if indexed.num_samples is not None else len(entries.labels)
            if len(entries.labels) != expected:
                raise InvalidData(
                    f"{shard.path}: {INDEX} says {expected} samples, the shard holds {len(entries.labels)}"
                )
            labels = entries.labels
            if len(labels):
                if (largest >= 0 and entries.names is not None) or (places and entries.names is None):
                    raise InvalidData(f"{shard.path}: has labels of another kind than the shards before it: {_MIXED}")
                if entries.names is None:
                    largest = max(largest, int(labels.max()))
                else:
                    labels = np.array([places.setdefault(name, len(places)) for name in entries.names])[labels]
            for section, values in zip(
                sections, (labels, entries.places, entries.key_ends + key_bytes, entries.keys), strict=True
            ):
                section.write(values)
            counts.append(len(labels))
            key_bytes += len(entries.keys)
            advance(1 if indexed.num_samples is None else len(labels))
            alive()
    num_classes = indexed.num_classes if indexed.num_classes is not None else (len(places) or largest + 1)
    _require_dense(indexed, num_classes, sum(counts))
    return counts, list(places) or None, num_classes


def _read_shards(indexed: IndexedSet) -> Iterator[ShardEntries]:
    is_small = sum(shard.num_bytes for shard in indexed.shards) < _ALONE_BYTES
    with Pool(1 if is_small or len(indexed.shards) < 2 else None) as pool:
        yield from pool.map(read_shard, [(shard.path, indexed.num_classes) for shard in indexed.shards])


def _require_dense(indexed: IndexedSet, num_classes: int, num_samples: int) -> None:
    least, each = _EMPTY_CLASSES
    if indexed.num_classes is None and num_classes > least + each * num_samples:
        raise InvalidData(
            f"{indexed.name}: labels reach to {num_classes - 1:,}, with {num_samples:,} samples: no class ids, "
            "which count from 0; `partialfc data convert` numbers the classes"
        )


def _sorted_ids(names: list[str]) -> Integers:
    """Return the class id of each name: its place in their order. ``names`` is put into it."""
    order = sorted(range(len(names)), key=names.__getitem__)
    ids = np.empty(len(names), dtype=np.int64)
    ids[order] = np.arange(len(names))
    names.sort()
    return ids


def _complete(
    file: BinaryIO, path: Path, indexed: IndexedSet, layout: Layout, num_classes: int, names: list[str] | None
) -> Classes:
    """Write checks and header of an index whose arrays are in their places, and count its classes."""
    counted = np.zeros(num_classes if indexed.num_classes is None else 0, dtype=np.int64)
    ends = layout.ends()
    content = hashlib.sha256()
    checks = np.zeros((layout.num_checks, 2), dtype="<u4")
    arrays = np.memmap(path, np.uint8, "r") if layout.num_samples else np.empty(0, np.uint8)
    key_start = 0
    for block in range(layout.num_checks):
        first, end = block * SAMPLES_A_CHECK, min((block + 1) * SAMPLES_A_CHECK, layout.num_samples)
        labels, places, key_ends = (arrays[begin + 8 * first : begin + 8 * end] for begin in ends[2:5])
        key_end = int(key_ends[-8:].view("<i8")[0])
        keys = arrays[ends[5] + key_start : ends[5] + key_end]
        checks[block] = entries_check(labels, places, key_ends), crc32(keys.data)
        for part in (labels, key_ends, keys):
            content.update(part.data)
        if len(counted):
            np.add.at(counted, labels.view("<i8"), 1)
        key_start = key_end
    header = {
        "format": FORMAT,
        "digest": indexed.digest,
        "num_samples": layout.num_samples,
        "num_classes": num_classes,
        "key_bytes": layout.key_bytes,
        "content": content.hexdigest(),
    }
    file.seek(HEADER_BYTES)
    tables = file.read(ends[1] - HEADER_BYTES) + checks.tobytes()
    file.seek(ends[1])
    file.write(checks.data)
    file.seek(0)
    text = json.dumps(header | {"check": header_digest(header, tables)}).encode()
    file.write(text.ljust(HEADER_BYTES - 1) + b"\n")
    return Classes(names, counted)
