"""Writer of data set folders: tar shards, the class table, and last the index, which completes the folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from partialfc.data.index import CLASSES, INDEX, content_digest
from partialfc.data.offsets import OFFSETS
from partialfc.data.pairs import PAIRS
from partialfc.data.tar import END_OF_ARCHIVE, IMAGE_EXTENSIONS, padding, ustar_header
from partialfc.errors import DataError
from partialfc.files import write_atomically

UNFINISHED = ".unfinished"  # marks a folder in progress, which may be cleared and written again


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
        self._file: IO[bytes] | None = None
        self._digest, self._in_shard, self._num_bytes = hashlib.sha256(), 0, 0
        self._keys_in_shard: set[str] = set()
        self._prepare_folder(overwrite)

    def _prepare_folder(self, overwrite: bool) -> None:
        check_target(self.folder, overwrite)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / UNFINISHED).touch()
        (self.folder / INDEX).unlink(missing_ok=True)  # first: from here on the folder is incomplete
        leftovers = (".*.json.[0-9]*", ".*.jsonl.[0-9]*", ".*.csv.[0-9]*")
        for pattern in ("shard-*.tar", "shard-*.tar.tmp", CLASSES, OFFSETS, PAIRS, *leftovers):
            for path in self.folder.glob(pattern):
                path.unlink()

    def write(self, key: str, image_bytes: bytes, extension: str, label: int) -> None:
        """Append one sample.

        Args:
            key: name of the sample: no dot, no slash, at most 95 bytes.
            extension: png, jpg or webp.
            label: class id.
        """
        if extension not in IMAGE_EXTENSIONS:
            raise DataError(f"extension must be one of {', '.join(IMAGE_EXTENSIONS)}, got {extension!r}")
        if not key or "." in key or "/" in key or "\0" in key:
            raise DataError(f"a sample's key must not be empty nor contain '.' or '/', got {key!r}")
        if label < 0:
            raise DataError(f"label of sample {key!r} must be a class id, got {label}")
        if key in self._keys_in_shard:
            raise DataError(f"two samples have the key {key!r}")
        if self._file is None:
            self._open_shard()
        self._keys_in_shard.add(key)
        self._add_member(f"{key}.{extension}", image_bytes)
        self._add_member(f"{key}.cls", str(int(label)).encode())
        self._samples_of_class[int(label)] += 1
        self._in_shard += 1
        if self._in_shard == self.samples_per_shard:
            self._close_shard()

    def finish(self, classes: Iterable[Mapping[str, Any]], extra: Mapping[str, Any] | None = None) -> str:
        """Write the class table and the index; return the digest of the content.

        Args:
            classes: one mapping per class, in the order of the ids, with at least ``name``.
            extra: further entries of the index, such as ``{"source": …}``, which do not enter the digest.
        """
        if self._file is not None:
            self._close_shard()
        lines = [
            json.dumps({"id": i, **entry, "samples": self._samples_of_class[i]}, ensure_ascii=False)
            for i, entry in enumerate(classes)
        ]
        largest = max(self._samples_of_class, default=-1)
        if largest >= len(lines):
            raise DataError(f"{len(lines)} classes were given to finish(), but a sample has label {largest}")
        table = "".join(f"{line}\n" for line in lines).encode()
        digest = content_digest((shard["sha256"] for shard in self._shards), [table])
        write_atomically(self.folder / CLASSES, table)
        index = {
            **(extra or {}),
            "shardlist": self._shards,
            "num_classes": len(lines),
            "num_samples": sum(shard["nsamples"] for shard in self._shards),
            "digest": digest,
        }
        write_atomically(self.folder / INDEX, json.dumps(index, ensure_ascii=False, indent=1).encode())
        (self.folder / UNFINISHED).unlink()
        self.finished = True
        return digest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None and not self.finished:
            raise DataError(f"{self.folder}: the writer was left without finish(); the data set is incomplete")

    def _shard_path(self) -> Path:
        return self.folder / f"shard-{len(self._shards):06d}.tar"

    def _open_shard(self) -> None:
        self._file = open(f"{self._shard_path()}.tmp", "wb", buffering=1 << 20)  # noqa: SIM115 - outlives this call
        self._digest, self._in_shard, self._num_bytes = hashlib.sha256(), 0, 0
        self._keys_in_shard.clear()

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._digest.update(data)
        self._num_bytes += len(data)

    def _add_member(self, name: str, data: bytes) -> None:
        self._append(ustar_header(name, len(data)) + data + padding(len(data)))

    def _close_shard(self) -> None:
        assert self._file is not None
        self._append(END_OF_ARCHIVE)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        path = self._shard_path()
        # Streamed sample by sample: `files.write_atomically` would need the whole shard in memory.
        os.replace(f"{path}.tmp", path)
        entry = {"url": path.name, "nsamples": self._in_shard, "nbytes": self._num_bytes}
        self._shards.append({**entry, "sha256": self._digest.hexdigest()})


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise a DataError if ``folder`` is not empty, unless ``overwrite`` is set or an interrupted writer left it."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite and not (folder / UNFINISHED).exists():
        raise DataError(f"{folder} is not empty; choose another folder, or pass --overwrite")
