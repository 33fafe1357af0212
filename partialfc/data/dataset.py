"""Reader of data set folders: random access to the samples of tar shards, through an index of offsets.

Nothing in the folder is trusted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from partialfc.data.class_table import read_classes, require_class_table
from partialfc.data.index import CLASSES, Shard, checked_digest, find_shards, read_index
from partialfc.data.offsets import build_offsets, load_offsets, save_offsets
from partialfc.data.writer import DatasetWriter
from partialfc.errors import DataUnavailable, InvalidData
from partialfc.tracking.console import Progress, no_progress

__all__ = ["DatasetWriter", "Shard", "TarDataset", "read_index"]


class TarDataset:
    """Random access to the samples of a data set folder.

    Safe in DataLoader workers, forked or spawned: each process opens the files itself and reads by position.

    Attributes:
        labels: int64 [num_samples], class ids in [0, num_classes).
        digest: of the content, as far as the index knows it.
        class_table: path of ``classes.jsonl``, unread: not every set needs one.

    Raises:
        InvalidData: the folder is incomplete or does not match its index, or an archive is damaged or hostile.
        DataUnavailable: a shard cannot be read.
    """

    labels: npt.NDArray[np.int64]

    def __init__(self, folder: Path | str, progress: Progress = no_progress) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.num_classes: int = self.index["num_classes"]
        self.num_samples: int = self.index["num_samples"]
        self.class_table = self.folder / CLASSES
        self.shards = find_shards(self.folder, self.index)
        self.digest = checked_digest(self.folder, self.index)
        offsets = load_offsets(self.folder, self.shards, self.num_classes, self.digest)
        if offsets is None:
            offsets = build_offsets(self.folder, self.shards, self.num_classes, progress)
            save_offsets(self.folder, offsets, self.shards, self.digest)
        self.labels = offsets.labels
        self._offsets = offsets
        self._files: dict[int, int] = {}  # shard -> file descriptor

    def __len__(self) -> int:
        return self.num_samples

    def read(self, i: int) -> bytes:
        """Return the encoded image of sample ``i``.

        Raises:
            InvalidData: the shard ends before it.
            DataUnavailable: the shard cannot be opened or read.
        """
        size = self.num_bytes(i)
        try:
            data = os.pread(self._file(int(self._offsets.shard[i])), size, int(self._offsets.offsets[i]))
        except OSError as error:
            raise DataUnavailable(f"{self.describe(i)} cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise InvalidData(f"{self.describe(i)}: {size} bytes expected, {len(data)} read; was the shard replaced?")
        return data

    def num_bytes(self, i: int) -> int:
        """Return the size of the encoded image of sample ``i``."""
        return int(self._offsets.sizes[i])

    def key(self, i: int) -> str:
        """Return the key of sample ``i``: its name in the shard, without extension."""
        start, stop = self._offsets.key_ends[i], self._offsets.key_ends[i + 1]
        return self._offsets.key_bytes[start:stop].tobytes().decode(errors="replace")

    @property
    def keys(self) -> list[str]:
        """The keys of all samples."""
        return [self.key(i) for i in range(self.num_samples)]

    def keys_and_labels(self) -> Iterator[memoryview]:
        """Yield the keys and labels of all samples as bytes, for a digest."""
        for array in (self._offsets.key_bytes, self._offsets.key_ends, self.labels):
            yield array.data

    def describe(self, i: int) -> str:
        """Describe sample ``i`` for messages: shard, key and index."""
        return f"{self.shards[int(self._offsets.shard[i])].path}: sample {self.key(i)!r} (index {i})"

    @cached_property
    def classes(self) -> list[dict[str, Any]]:
        """The class table by class id: ``id``, ``name``, ``samples``, and further fields of the source."""
        require_class_table(self.class_table, self.num_classes)
        return list(read_classes(self.class_table))

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            self._files[shard] = os.open(self.shards[shard].path, os.O_RDONLY | os.O_CLOEXEC)
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
