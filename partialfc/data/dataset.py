"""Reader of data set folders: random access to the samples of tar shards, through an index of offsets.

One walk over the tars' headers builds the index, which is cached beside them. Nothing in the folder is trusted.
"""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from partialfc.data.tar import walk_samples
from partialfc.data.writer import CLASSES, INDEX, OFFSETS, DatasetWriter
from partialfc.errors import DataError
from partialfc.tracking.console import Progress, no_progress

__all__ = ["DatasetWriter", "Shard", "TarDataset", "read_index"]


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar file of a data set."""

    path: Path
    num_samples: int
    num_bytes: int


def read_index(folder: Path | str) -> dict[str, Any]:
    """Read ``index.json`` of a data set folder and check its fields, not the shards.

    Raises:
        DataError: it is missing, cannot be read, or a field is wrong.
    """
    path = Path(folder) / INDEX
    try:
        index = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{folder} is not a complete data set folder: {INDEX} is missing") from error
    except NotADirectoryError as error:
        raise DataError(f"{folder} is a file; expected a data set folder, which holds {INDEX}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(index, dict) or not isinstance(index.get("shardlist"), list):
        raise DataError(f"{path}: expected an object with a list 'shardlist'")
    for field in ("num_classes", "num_samples"):
        if not _is_count(index.get(field)):
            raise DataError(f"{path}: {field!r} must be a count, got {index.get(field)!r}")
    for entry in index["shardlist"]:
        _check_shard_entry(entry, path)
    total = sum(entry["nsamples"] for entry in index["shardlist"])
    if total != index["num_samples"]:
        raise DataError(f"{path}: num_samples is {index['num_samples']}, but the shards hold {total}")
    return index


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_shard_entry(entry: object, path: Path) -> None:
    if not isinstance(entry, dict) or not _is_count(entry.get("nsamples")) or not _is_count(entry.get("nbytes")):
        raise DataError(f"{path}: a shard needs 'url', 'nsamples' and 'nbytes', got {entry!r}")
    url = entry.get("url")
    if not isinstance(url, str) or url in ("", ".", "..") or any(c in url for c in "/\\|:\0"):
        raise DataError(f"{path}: a shard's url must be the name of a file in the folder, got {url!r}")


class TarDataset:
    """Random access to the samples of a data set folder.

    Safe in DataLoader workers, forked or spawned: each process opens the files itself and reads by position.

    Attributes:
        labels: int64 [num_samples], class ids in [0, num_classes).

    Raises:
        DataError: the folder is incomplete or does not match its index, or an archive is damaged or hostile.
    """

    labels: npt.NDArray[np.int64]

    def __init__(self, folder: Path | str, progress: Progress = no_progress) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.num_classes: int = self.index["num_classes"]
        self.num_samples: int = self.index["num_samples"]
        self.digest = str(self.index.get("digest", ""))
        self.shards = [
            Shard(self.folder / entry["url"], entry["nsamples"], entry["nbytes"]) for entry in self.index["shardlist"]
        ]
        self._check_shard_sizes()
        offsets = _load_cache(self) or _build_and_cache(self, progress)
        self.labels = offsets.labels
        self._offsets = offsets
        self._files: dict[int, int] = {}  # shard -> file descriptor

    def _check_shard_sizes(self) -> None:
        for shard in self.shards:
            if not shard.path.is_file():
                raise DataError(f"{self.folder}: shard {shard.path.name} is missing")
            size = shard.path.stat().st_size
            if size != shard.num_bytes:
                raise DataError(f"{shard.path}: {INDEX} says {shard.num_bytes} bytes, the file has {size}")

    def __len__(self) -> int:
        return self.num_samples

    def read(self, i: int) -> bytes:
        """Return the encoded image of sample ``i``."""
        shard = int(self._offsets.shard[i])
        size = int(self._offsets.sizes[i])
        data = os.pread(self._file(shard), size, int(self._offsets.offsets[i]))
        if len(data) != size:
            raise DataError(f"{self.describe(i)}: {size} bytes expected, {len(data)} read; was the shard replaced?")
        return data

    def key(self, i: int) -> str:
        """Return the key of sample ``i``: its name in the shard, without extension."""
        start, stop = self._offsets.key_ends[i], self._offsets.key_ends[i + 1]
        return self._offsets.key_bytes[start:stop].tobytes().decode()

    @property
    def keys(self) -> list[str]:
        """The keys of all samples."""
        return [self.key(i) for i in range(self.num_samples)]

    def describe(self, i: int) -> str:
        """Describe sample ``i`` for messages: shard, key and index."""
        return f"{self.shards[int(self._offsets.shard[i])].path}: sample {self.key(i)!r} (index {i})"

    @cached_property
    def classes(self) -> list[dict[str, Any]]:
        """The class table by class id: ``id``, ``name``, ``samples``, and further fields of the source."""
        path = self.folder / CLASSES
        try:
            with open(path, encoding="utf-8") as lines:
                table = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        if [entry.get("id") if isinstance(entry, dict) else None for entry in table] != list(range(self.num_classes)):
            raise DataError(f"{path}: expected one object a line with 'id' 0..{self.num_classes - 1}, in this order")
        return table

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            try:
                self._files[shard] = os.open(self.shards[shard].path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise DataError(f"{self.shards[shard].path} cannot be opened: {error}") from error
        return self._files[shard]

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        if "_files" in self.__dict__:
            self.close()


@dataclass(frozen=True, slots=True)
class _Offsets:
    """Place and label of each sample."""

    shard: npt.NDArray[np.int32]  # [num_samples]
    offsets: npt.NDArray[np.int64]  # [num_samples], of the image in its shard
    sizes: npt.NDArray[np.int64]  # [num_samples]
    labels: npt.NDArray[np.int64]  # [num_samples]
    key_bytes: npt.NDArray[np.uint8]  # all keys, UTF-8, one after another
    key_ends: npt.NDArray[np.int64]  # [num_samples + 1]


def _build_and_cache(dataset: TarDataset, progress: Progress) -> _Offsets:
    shard, offsets, sizes, labels = list[int](), list[int](), list[int](), list[int]()
    keys, key_ends = bytearray(), [0]
    with progress(f"indexing {dataset.folder}", dataset.num_samples) as advance:
        for number, entry in enumerate(dataset.shards):
            before = len(labels)
            for sample in walk_samples(entry.path):
                shard.append(number)
                offsets.append(sample.offset)
                sizes.append(sample.size)
                labels.append(sample.label)
                keys += sample.key.encode()
                key_ends.append(len(keys))
            if len(labels) - before != entry.num_samples:
                found = len(labels) - before
                raise DataError(f"{entry.path}: {INDEX} says {entry.num_samples} samples, the shard holds {found}")
            advance(entry.num_samples)
    wrong = next((i for i, label in enumerate(labels) if label >= dataset.num_classes), None)
    if wrong is not None:
        raise DataError(
            f"{dataset.shards[shard[wrong]].path}: sample with label {labels[wrong]} (index {wrong}), "
            f"but the data set has classes 0..{dataset.num_classes - 1}"
        )
    result = _Offsets(
        np.array(shard, dtype=np.int32),
        np.array(offsets, dtype=np.int64),
        np.array(sizes, dtype=np.int64),
        np.array(labels, dtype=np.int64),
        np.frombuffer(bytes(keys), dtype=np.uint8),
        np.array(key_ends, dtype=np.int64),
    )
    _save_cache(dataset, result)
    return result


def _save_cache(dataset: TarDataset, offsets: _Offsets) -> None:
    path = dataset.folder / OFFSETS
    # Streamed: `files.write_atomically` would need the whole archive in memory beside its arrays. Nor is it synced to
    # the disk: an index that a crash tears is found to be damaged, and built again.
    temporary = dataset.folder / f"{OFFSETS}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            arrays = {name: getattr(offsets, name) for name in _Offsets.__slots__}
            np.savez(file, digest=np.array(dataset.digest), **arrays)
        os.replace(temporary, path)
    except OSError:  # a read-only folder: every start builds the index
        temporary.unlink(missing_ok=True)


def _load_cache(dataset: TarDataset) -> _Offsets | None:
    """Return the cached index; None if it is missing, damaged, or of other data."""
    try:
        with np.load(dataset.folder / OFFSETS, allow_pickle=False) as arrays:
            if not dataset.digest or str(arrays["digest"]) != dataset.digest:
                return None
            offsets = _Offsets(**{name: arrays[name] for name in _Offsets.__slots__})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError):
        return None
    return offsets if _is_valid(offsets, dataset) else None


def _is_valid(offsets: _Offsets, dataset: TarDataset) -> bool:
    n = dataset.num_samples
    kinds = {"shard": np.int32, "key_bytes": np.uint8}
    for name in _Offsets.__slots__:
        array = getattr(offsets, name)
        if array.ndim != 1 or array.dtype != kinds.get(name, np.int64):
            return False
        if name != "key_bytes" and len(array) != n + (name == "key_ends"):
            return False
    if n == 0:
        return True
    counts = np.bincount(offsets.shard.clip(0), minlength=len(dataset.shards)).tolist()
    ends = np.array([shard.num_bytes for shard in dataset.shards], dtype=np.int64)
    return bool(
        offsets.shard.min() >= 0
        and counts == [shard.num_samples for shard in dataset.shards]
        and offsets.offsets.min() >= 0
        and offsets.sizes.min() >= 0
        and (offsets.sizes <= ends[offsets.shard] - offsets.offsets).all()
        and 0 <= offsets.labels.min() <= offsets.labels.max() < dataset.num_classes
        and offsets.key_ends[0] == 0
        and (np.diff(offsets.key_ends) > 0).all()
        and offsets.key_ends[-1] == len(offsets.key_bytes)
    )
