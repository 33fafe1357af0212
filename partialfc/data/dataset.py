"""Reader of training and evaluation sets: random access to the samples of tar shards, through an index.

Nothing in the shards is trusted.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from partialfc.data.class_table import read_classes, require_class_table
from partialfc.data.index import (
    CLASSES,
    Shard,
    checked_digest,
    content_digest,
    file_pieces,
    find_shard,
    find_shards,
    read_index,
    shard_lines,
)
from partialfc.data.index_cache import beside, open_index
from partialfc.data.offsets import IndexedSet
from partialfc.data.open_files import OpenFiles
from partialfc.data.plain import DataPath, describe, list_shards, set_folder
from partialfc.data.writer import DatasetWriter
from partialfc.errors import DataUnavailable, InvalidData
from partialfc.tracking.console import Progress, no_progress

__all__ = ["DatasetWriter", "Shard", "TarDataset", "read_index"]


class TarDataset:
    """Random access to the samples of a set.

    Safe in DataLoader workers, forked or spawned: each process opens the files itself and reads by position. The index
    is mapped, not copied.

    Args:
        source: a data set folder, or WebDataset shards without ``index.json``: their folder, a tar, a pattern such as
            ``train-{000..123}.tar``, or a list of these. Shards without ``index.json`` have their ``.cls`` as labels:
            class ids, or names, whose order gives the ids.

    Attributes:
        folder: of the set; of shards without ``index.json``, the one that holds the first of them.
        index: content of ``index.json``, or what stands for it.
        digest: of the content, as far as the index knows it.
        class_table: path of ``classes.jsonl``, unread: not every set needs one.

    Raises:
        ConfigError: a pattern is malformed.
        InvalidData: the set is incomplete or does not match its index, or an archive is damaged or hostile.
        DataUnavailable: a shard cannot be read.
    """

    def __init__(self, source: DataPath, progress: Progress = no_progress) -> None:
        folder = set_folder(source)
        if folder is None:
            self._open_plain(source, progress)
        else:
            self._open_folder(folder, progress)
        self._files = OpenFiles([shard.path for shard in self.shards])
        self.num_classes: int = self.index["num_classes"]
        self.num_samples: int = self.index["num_samples"]

    def _open_folder(self, folder: Path, progress: Progress) -> None:
        self.folder, self.class_table = folder, folder / CLASSES
        self.index = read_index(folder)
        self.shards = find_shards(folder, self.index)
        self.digest = checked_digest(folder, self.index)
        counts = [entry["nsamples"] for entry in self.index["shardlist"]]
        indexed = IndexedSet(str(folder), self.shards, self.digest, self.index["num_classes"], counts)
        self._samples = open_index(indexed, folder, needs_table=False, progress=progress)

    def _open_plain(self, source: DataPath, progress: Progress) -> None:
        paths = list_shards(source)
        self.folder = paths[0].parent
        self.shards = [find_shard(path) for path in paths]
        names = content_digest((shard.path.name for shard in self.shards), ())
        self._samples = open_index(IndexedSet(describe(source), self.shards, names), beside(paths), True, progress)
        if not self._samples.num_samples:
            raise InvalidData(
                f"{describe(source)}: no samples; expected images with a .cls of the same name (`partialfc data "
                "convert` takes other forms)"
            )
        self.class_table = self._samples.path.with_name(CLASSES)
        shardlist = [
            {"url": shard.path.name, "nsamples": count, "nbytes": shard.num_bytes}
            for shard, count in zip(self.shards, self._samples.counts.tolist(), strict=True)
        ]
        self.index = {
            "shardlist": shardlist,
            "num_classes": self._samples.num_classes,
            "num_samples": self._samples.num_samples,
        }
        # Of the keys and labels too: nothing else tells what is in the shards.
        lines = [*shard_lines(shardlist), self._samples.content]
        self.digest = content_digest(lines, file_pieces(self.class_table))

    def __len__(self) -> int:
        return self.num_samples

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class ids of all samples, int64 [num_samples], in [0, num_classes); mapped, and not to be written to."""
        return self._samples.labels

    def labels_of(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the class ids of ``samples [n]``, int64 [n], without a look at all others."""
        return self._samples.labels_of(samples)

    def read(self, i: int) -> bytes:
        """Return the encoded image of sample ``i``.

        Raises:
            InvalidData: the shard ends before it.
            DataUnavailable: the shard cannot be opened or read, or the index is damaged.
        """
        entry = self._samples[i]
        try:
            data = os.pread(self._files.descriptor(entry.shard), entry.size, entry.offset)
        except OSError as error:
            raise DataUnavailable(f"{self.describe(i)} cannot be read: {error.strerror}") from error
        if len(data) != entry.size:
            raise InvalidData(
                f"{self.describe(i)}: {entry.size} bytes expected, {len(data)} read; was the shard replaced?"
            )
        return data

    def num_bytes(self, i: int) -> int:
        """Return the size of the encoded image of sample ``i``."""
        return self._samples[i].size

    def key(self, i: int) -> str:
        """Return the key of sample ``i``: its name in the shard, without extension."""
        return self._samples.key(i)

    @property
    def keys(self) -> list[str]:
        """The keys of all samples."""
        return [self.key(i) for i in range(self.num_samples)]

    @property
    def content(self) -> str:
        """Digest of the keys and labels of all samples, as the index recorded it when it was made."""
        return self._samples.content

    def describe(self, i: int) -> str:
        """Describe sample ``i`` for messages: shard, key and index."""
        return f"{self.shards[self._samples[i].shard].path}: sample {self.key(i)!r} (index {i})"

    @cached_property
    def classes(self) -> list[dict[str, Any]]:
        """The class table by class id: ``id``, ``name``, ``samples``, and further fields of the source."""
        require_class_table(self.class_table, self.num_classes)
        return list(read_classes(self.class_table))

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        self._files.close()
