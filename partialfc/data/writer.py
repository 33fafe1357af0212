"""Writer of data set folders: tar shards, the class table, and last the index, which completes the folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from partialfc.data.class_table import class_line
from partialfc.data.index import CLASSES, INDEX, content_digest
from partialfc.data.offsets import OFFSETS
from partialfc.data.pairs import PAIRS
from partialfc.data.tar import END_OF_ARCHIVE, IMAGE_EXTENSIONS, padding, ustar_header
from partialfc.errors import ConfigError, DataError
from partialfc.files import open_new, sync_to_disk, write_atomically

UNFINISHED = ".unfinished"  # marks a folder in progress, which may be cleared and written again
_PIECE = 1 << 20
_LEFTOVERS = ("shard-*.tar*.tmp", ".*.json.[0-9]*", ".*.jsonl.[0-9]*", ".*.csv.[0-9]*")
_FILES = ("shard-*.tar", CLASSES, OFFSETS, f".{OFFSETS}*", PAIRS, *_LEFTOVERS)


class ShardWriter:
    """Writes one shard; only :meth:`close` gives the file its name, so a shard is complete or absent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_samples = 0
        self._keys: set[str] = set()
        self._digest, self._num_bytes = hashlib.sha256(), 0
        # Its own in each process: one that was left over by a killed command may still write the same shard.
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._file = open_new(self._temporary, buffering=_PIECE)

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def write(self, key: str, image_bytes: bytes, extension: str, label: int) -> None:
        """Append one sample, as :meth:`DatasetWriter.write` does."""
        check_sample(key, extension, label)
        if key in self._keys:
            raise DataError(f"two samples have the key {key!r}")
        self._keys.add(key)
        members = (f"{key}.{extension}", image_bytes), (f"{key}.cls", str(label).encode())
        for name, data in members:
            self._append(b"".join((ustar_header(name, len(data)), data, padding(len(data)))))
        self.num_samples += 1

    def close(self) -> dict[str, Any]:
        """Complete the shard, on disk too, and return its entry in the index: url, nsamples, nbytes, sha256.

        Raises:
            OSError: the file cannot be written; it is removed.
        """
        try:
            self._append(END_OF_ARCHIVE)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            # Streamed sample by sample: `files.write_atomically` would need the whole shard in memory.
            os.replace(self._temporary, self.path)
        except BaseException:
            self.discard()
            raise
        entry = {"url": self.path.name, "nsamples": self.num_samples, "nbytes": self._num_bytes}
        return {**entry, "sha256": self._digest.hexdigest()}

    def discard(self) -> None:
        """Remove what is written so far."""
        with suppress(OSError):  # a full disk refuses what is still buffered
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._num_bytes += len(data)


class DatasetWriter:
    """Writes samples into shards; only :meth:`finish` makes the folder complete.

    ::

        with DatasetWriter(folder) as writer:
            writer.write("0001", png_bytes, "png", label=3)
            ...
            writer.finish(classes=[{"name": "first"}, ...])

    The same samples in the same order give the same bytes. A non-empty folder is refused unless an interrupted writer
    left it or ``overwrite`` is set; then only files of the format are removed.
    """

    def __init__(self, folder: Path | str, samples_per_shard: int = 10_000, overwrite: bool = False) -> None:
        if samples_per_shard < 1:
            raise DataError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        self.finished = False
        self._shards: list[dict[str, Any]] = []
        self._samples_of_class: Counter[int] = Counter()
        self._shard: ShardWriter | None = None
        check_target(self.folder, overwrite)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / UNFINISHED).touch()
        remove_dataset(self.folder)

    def write(self, key: str, image_bytes: bytes, extension: str, label: int) -> None:
        """Append one sample.

        Args:
            key: name of the sample, at most 95 bytes: no dot; folders, if any, as in ``a/b/0001``.
            extension: png, jpg or webp.
            label: class id.
        """
        check_sample(key, extension, label)
        if self._shard is None:
            self._shard = ShardWriter(self.folder / shard_name(len(self._shards)))
        self._shard.write(key, image_bytes, extension, int(label))
        self._samples_of_class[int(label)] += 1
        if self._shard.num_samples == self.samples_per_shard:
            self._close_shard()

    def finish(self, classes: Iterable[Mapping[str, Any]], extra: Mapping[str, Any] | None = None) -> str:
        """Write the class table and the index; return the digest of the content.

        Args:
            classes: one mapping per class, in the order of the ids, with at least ``name``.
            extra: further entries of the index, such as ``{"source": …}``, which do not enter the digest.
        """
        self._close_shard()
        entries = list(classes)
        largest = max(self._samples_of_class, default=-1)
        if largest >= len(entries):
            raise DataError(f"{len(entries)} classes were given to finish(), but a sample has label {largest}")
        table = ({"id": i, **entry, "samples": self._samples_of_class[i]} for i, entry in enumerate(entries))
        digest = complete_dataset(self.folder, self._shards, table, extra or {})
        self.finished = True
        return digest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard is not None:
            self._shard.discard()
        if kind is None and not self.finished:
            raise DataError(f"{self.folder}: the writer was left without finish(); the data set is incomplete")

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(self._shard.close())
            self._shard = None


def shard_name(number: int) -> str:
    """Return the file name of a data set's shard."""
    return f"shard-{number:06d}.tar"


def check_sample(key: str, extension: str, label: int) -> None:
    """Raise a DataError if a sample could not be read back."""
    if extension not in IMAGE_EXTENSIONS:
        raise DataError(f"extension must be one of {', '.join(IMAGE_EXTENSIONS)}, got {extension!r}")
    name = key.rpartition("/")[2]
    if not name or "." in name or "\0" in key or ("/" in key and not all(part.strip(".") for part in key.split("/"))):
        raise DataError(f"a sample's key must not be empty, contain '.' or lead out of its folder, got {key!r}")
    if label < 0:
        raise DataError(f"label of sample {key!r} must be a class id, got {label}")


def complete_dataset(
    folder: Path, shards: Sequence[Mapping[str, Any]], classes: Iterable[Mapping[str, Any]], extra: Mapping[str, Any]
) -> str:
    """Write the class table, and then the index, which makes the folder complete; return the digest of the content.

    Args:
        shards: entries of the index, in their order.
        classes: lines of the class table, written as they come: their number does not matter to memory.
        extra: further entries of the index.
    """
    num_classes = 0
    temporary = folder / f".{CLASSES}.{os.getpid()}"
    try:
        with open_new(temporary) as file:
            for entry in classes:
                file.write(class_line(entry))
                num_classes += 1
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            shard_digests = (str(shard["sha256"]) for shard in shards)
            digest = content_digest(shard_digests, iter(lambda: file.read(_PIECE), b""))
        temporary.replace(folder / CLASSES)
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(OSError):  # some file systems cannot sync a folder
        sync_to_disk(folder)
    index = {
        **extra,
        "shardlist": list(shards),
        "num_classes": num_classes,
        "num_samples": sum(shard["nsamples"] for shard in shards),
        "digest": digest,
    }
    write_atomically(folder / INDEX, json.dumps(index, ensure_ascii=False, indent=1).encode())
    (folder / UNFINISHED).unlink(missing_ok=True)
    return digest


def remove_dataset(folder: Path) -> None:
    """Remove the files of a data set from a folder; others stay."""
    (folder / INDEX).unlink(missing_ok=True)  # first: from here on the folder is incomplete
    for pattern in _FILES:
        for path in folder.glob(pattern):
            path.unlink()


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise a ConfigError if ``folder`` is not empty, unless ``overwrite`` is set or an interrupted writer left it."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite and not (folder / UNFINISHED).exists():
        raise ConfigError(f"{folder} is not empty; choose another folder, or pass --overwrite")
