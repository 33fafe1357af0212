"""``samples.index``: where each sample of a set lies, with its label and key, in a file that processes map and share.

A header of 4096 bytes (JSON), then little-endian arrays:

- stamps: int64 [shards, 4], samples, bytes, modification time (ns) and inode of each shard
- checks: uint32 [blocks, 2], CRC-32 of each block of 1024 samples: of its entries, of its keys
- labels: int64 [samples]
- places: uint32 [samples, 2], the image's offset in its shard in blocks of 512 bytes, and its size in bytes
- key ends: int64 [samples], where each key ends in the keys
- keys: UTF-8, one after another

Opening reads header, stamps and checks. What belongs to a sample is checked when it is first needed, a block at a time:
to read all at each start would take minutes for hundreds of millions of samples.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from zlib import crc32

import numpy as np
import numpy.typing as npt

from partialfc.data.index import Shard
from partialfc.data.tar import BLOCK
from partialfc.errors import DataUnavailable
from partialfc.files import open_regular, parse_json

OFFSETS = "samples.index"
FORMAT = "partialfc samples 1"
HEADER_BYTES = 4096
SAMPLES_A_CHECK = 1024
_CHECKED_AT_OPEN = 1 << 20  # samples of a set that is small enough to be checked at once: some 20 ms
_UNUSABLE = (ValueError, KeyError, TypeError, OSError, OverflowError)  # what an index of any content may raise

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class IndexedSet:
    """The set that an index is of.

    Attributes:
        digest: of all that is known of it without its shards.
        num_classes: None: as the labels say.
        num_samples: of each shard; None: unknown.
    """

    name: str  # for messages
    shards: Sequence[Shard]
    digest: str
    num_classes: int | None = None
    num_samples: Sequence[int] | None = None


class Entry(NamedTuple):
    """Place and label of a sample."""

    shard: int
    offset: int  # of the image in its shard
    size: int
    label: int


class Layout(NamedTuple):
    """Numbers that give an index its size and the places of its arrays."""

    num_shards: int
    num_samples: int
    key_bytes: int

    @property
    def num_checks(self) -> int:
        """Blocks of samples."""
        return -(-self.num_samples // SAMPLES_A_CHECK)

    def ends(self) -> list[int]:
        """Return the bytes at which header, stamps, checks, labels, places, key ends and keys end."""
        sizes = [32 * self.num_shards, 8 * self.num_checks, *[8 * self.num_samples] * 3, self.key_bytes]
        ends = [HEADER_BYTES]
        for size in sizes:
            ends.append(ends[-1] + size)
        return ends


def stamps_of(shards: Sequence[Shard], num_samples: Sequence[int]) -> Integers:
    """Return samples, size, modification time and inode of each shard: a swapped or edited one differs."""
    stamps = [
        (count, shard.num_bytes, shard.modified, shard.inode % 2**63)
        for shard, count in zip(shards, num_samples, strict=True)
    ]
    return np.array(stamps, dtype="<i8").reshape(-1, 4)


def header_digest(header: dict[str, Any], tables: bytes | memoryview) -> str:
    """Return the digest of a header, without its own, and of stamps and checks."""
    known = {key: value for key, value in header.items() if key != "check"}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    digest.update(tables)
    return digest.hexdigest()


class SampleIndex:
    """An index in a file, mapped into memory; pickled, it travels as its path.

    Attributes:
        num_samples, num_classes: of the set.
        content: digest of all keys and labels, recorded when the index was made.
        counts: samples of each shard.

    Raises:
        ValueError, KeyError, TypeError, OverflowError: the file is damaged, or of another set.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, indexed: IndexedSet) -> None:
        self.path, self._indexed = path, indexed
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            header = parse_json(file.read(HEADER_BYTES))
            layout = Layout(len(indexed.shards), int(header["num_samples"]), int(header["key_bytes"]))
            ends = layout.ends()
            if header["format"] != FORMAT or min(layout) < 0 or size != ends[-1]:
                raise ValueError("of another size or format")
            if type(header["num_classes"]) is not int or not isinstance(header["content"], str):
                raise ValueError("of other fields")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        tables = memoryview(self._map)[HEADER_BYTES : ends[2]]
        if header["check"] != header_digest(header, tables) or header["digest"] != indexed.digest:
            raise ValueError("damaged, or of another set")
        self.num_samples: int = layout.num_samples
        self.num_classes: int = header["num_classes"]
        self.content: str = header["content"]
        stamps = self._array("<i8", ends[0], 4 * layout.num_shards).reshape(-1, 4)
        self.counts: Integers = stamps[:, 0].copy()
        if not np.array_equal(stamps, stamps_of(indexed.shards, self.counts.tolist())):
            raise ValueError("the shards have changed")
        expected = self.counts.tolist() if indexed.num_samples is None else list(indexed.num_samples)
        if (
            self.counts.tolist() != expected
            or (self.counts < 0).any()
            or self.counts.sum() != self.num_samples
            or indexed.num_classes not in (None, self.num_classes)
        ):
            raise ValueError("of other numbers of samples or classes")
        self._first = np.concatenate(([0], np.cumsum(self.counts)))  # samples before each shard
        self._checks = self._array("<u4", ends[1], 2 * layout.num_checks).reshape(-1, 2)
        self._labels: Integers = self._array("<i8", ends[2], layout.num_samples)
        self._places = self._array("<u4", ends[3], 2 * layout.num_samples).reshape(-1, 2)
        self._key_ends: Integers = self._array("<i8", ends[4], layout.num_samples)
        self._keys = self._array("u1", ends[5], layout.key_bytes)
        self._checked = bytearray(layout.num_checks)  # 1: entries, 2: keys, 3: both
        if self.num_samples > _CHECKED_AT_OPEN:
            self._map.madvise(mmap.MADV_RANDOM)  # else each look-up reads ahead: 40 times as long, from a disk
        elif not all(map(self._is_intact, range(layout.num_checks))):
            raise ValueError("damaged")

    def _array(self, dtype: str, start: int, count: int) -> Any:
        return np.frombuffer(self._map, dtype, count, start) if count else np.empty(0, dtype)

    def __getitem__(self, i: int) -> Entry:
        """Return the entry of sample ``i``.

        Raises:
            IndexError: there is no such sample.
            DataUnavailable: the index is damaged there.
        """
        self._require(self._block(i))
        shard = int(np.searchsorted(self._first, i, "right")) - 1
        blocks, size = self._places[i].tolist()
        entry = Entry(shard, blocks * BLOCK, size, int(self._labels[i]))
        # Its check agrees, and so it was written like this: by someone else, then.
        if entry.offset + size > self._indexed.shards[shard].num_bytes or not 0 <= entry.label < self.num_classes:
            self._damaged(self._block(i))
        return entry

    def key(self, i: int) -> str:
        """Return the key of sample ``i``; raises as :meth:`__getitem__`."""
        block = self._block(i)
        self._require(block)
        if not self._checked[block] & 2:
            start, end = self._key_range(block * SAMPLES_A_CHECK, min((block + 1) * SAMPLES_A_CHECK, self.num_samples))
            if crc32(self._keys[start:end]) != self._checks[block, 1]:
                self._damaged(block)
            self._checked[block] |= 2
        start, end = self._key_range(i, i + 1)
        return self._keys[start:end].tobytes().decode(errors="replace")

    def labels_of(self, samples: Integers) -> Integers:
        """Return the labels of ``samples [n]``, int64 [n]; raises as :meth:`__getitem__`."""
        for block in np.unique(samples // SAMPLES_A_CHECK).tolist():
            self._require(block)
        labels = self._labels[samples]
        for i in samples[(labels < 0) | (labels >= self.num_classes)][:1].tolist():
            self._damaged(self._block(i))
        return labels

    @cached_property
    def labels(self) -> Integers:
        """Labels of all samples, int64 [num_samples], mapped; the first use checks them all."""
        self._map.madvise(mmap.MADV_SEQUENTIAL)
        for block in np.flatnonzero(np.frombuffer(self._checked, np.uint8) & 1 == 0).tolist():
            self._require(block)
        self._map.madvise(mmap.MADV_RANDOM)
        labels = self._labels
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.num_classes:
            self._damaged(0)
        return labels

    def _block(self, i: int) -> int:
        if not 0 <= i < self.num_samples:
            raise IndexError(i)
        return i // SAMPLES_A_CHECK

    def _key_range(self, first: int, end: int) -> tuple[int, int]:
        start = int(self._key_ends[first - 1]) if first else 0
        stop = int(self._key_ends[end - 1])
        if not 0 <= start <= stop <= len(self._keys):
            self._damaged(first // SAMPLES_A_CHECK)
        return start, stop

    def _is_intact(self, block: int) -> bool:
        if not self._checked[block] & 1:
            part = slice(block * SAMPLES_A_CHECK, (block + 1) * SAMPLES_A_CHECK)
            if entries_check(self._labels[part], self._places[part], self._key_ends[part]) != self._checks[block, 0]:
                return False
            self._checked[block] |= 1
        return True

    def _require(self, block: int) -> None:
        if not self._is_intact(block):
            self._damaged(block)

    def _damaged(self, block: int) -> NoReturn:
        with suppress(OSError):
            self.path.unlink()  # so that the next start makes it anew
        raise DataUnavailable(
            f"{self.path} is damaged from sample {block * SAMPLES_A_CHECK:,} on, and removed; "
            "the next start makes it again"
        )

    def __getstate__(self) -> tuple[Path, IndexedSet]:
        return self.path, self._indexed

    def __setstate__(self, state: tuple[Path, IndexedSet]) -> None:
        try:
            self.__init__(*state)  # type: ignore[misc]
        except _UNUSABLE as error:
            raise DataUnavailable(f"{state[0]}: the index was replaced or removed while it was in use") from error


def entries_check(labels: Any, places: Any, key_ends: Any) -> int:
    """Return the CRC-32 of the entries of a block."""
    return crc32(key_ends, crc32(places, crc32(labels)))


def load_index(path: Path, indexed: IndexedSet) -> SampleIndex | None:
    """Return the index in a file; None if it is missing, damaged, or of other shards."""
    try:
        return SampleIndex(path, indexed)
    except _UNUSABLE:  # whatever is wrong: make it anew
        return None
