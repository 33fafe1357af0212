"""``partialfc data verify``: the whole of a set against what its index says, down to every pixel."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from partialfc.data.class_table import read_classes, require_class_table
from partialfc.data.dataset import TarDataset
from partialfc.data.decode import BadImage, open_image, require_plausible_size
from partialfc.data.index import CLASSES, checked_digest, find_shard, read_index
from partialfc.data.plain import DataPath, describe, list_shards, set_folder
from partialfc.data.pool import Pool
from partialfc.data.samples import Sample, class_id, walk_samples
from partialfc.errors import DataUnavailable, InvalidData
from partialfc.files import open_regular
from partialfc.tracking.console import Progress, no_progress

_KEPT = 100  # problems that are listed; of a shard, too


@dataclass
class Problems:
    """What is wrong with a set: the first hundred in words, the others counted."""

    found: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, problem: object) -> None:
        """Add a problem."""
        self.count += 1
        if len(self.found) < _KEPT:
            self.found.append(str(problem))

    def extend(self, others: Problems) -> None:
        """Add those of a part."""
        self.found += others.found[: max(0, _KEPT - len(self.found))]
        self.count += others.count


@dataclass
class SetFindings:
    """What was looked at, and found."""

    problems: Problems = field(default_factory=Problems)
    num_shards: int = 0
    num_samples: int = 0
    num_bytes: int = 0


@dataclass
class ShardFindings:
    """What one shard holds."""

    problems: Problems
    num_samples: int
    num_bytes: int
    labels: Counter[int]  # samples of each class id


def verify(
    source: DataPath, max_pixels: int, workers: int | None = None, progress: Progress = no_progress
) -> SetFindings:
    """Read all of a set: sizes and digests of its shards, labels, class table and its counts, and decode every image.

    Args:
        max_pixels: the most pixels that an image may have.
        workers: number of processes; None: all cores.

    Raises:
        ConfigError: a pattern is malformed.
        DataUnavailable: a file cannot be read this time; all else that is wrong is among the problems.
    """
    result = SetFindings()
    try:
        expected = _expect(source, result.problems)
    except InvalidData as error:
        result.problems.add(error)
        return result
    counts = np.zeros(expected.num_classes or 0, dtype=np.int64)
    tasks = [(path, entry, expected.num_classes, max_pixels) for path, entry in expected.shards]
    with progress(f"verifying {describe(source)}", len(tasks)) as advance, Pool(workers) as pool:
        found: ShardFindings
        for found in pool.map(verify_shard, tasks):
            result.problems.extend(found.problems)
            result.num_shards += 1
            result.num_samples += found.num_samples
            result.num_bytes += found.num_bytes
            for label, number in found.labels.items():
                counts[label] += number
            advance(1, f"{result.problems.count:,} problems" if result.problems.count else "")
    if expected.table is not None:
        _check_table(expected.table, counts, result.num_samples == expected.num_samples, result.problems)
    return result


@dataclass(frozen=True)
class _Expected:
    """What is to be looked at, and what the index says; None: there is none."""

    shards: list[tuple[Path, dict[str, Any]]]  # with their entries in the index
    num_classes: int | None = None
    num_samples: int | None = None
    table: Path | None = None


def _expect(source: DataPath, problems: Problems) -> _Expected:
    folder = set_folder(source)
    if folder is None:
        TarDataset(source)  # which finds labels of two kinds
        return _Expected([(path, {}) for path in list_shards(source)])
    index = read_index(folder)
    shards = []
    for entry in index["shardlist"]:
        try:
            shards.append((find_shard(folder / entry["url"]).path, entry))
        except InvalidData as error:
            problems.add(error)
    try:
        checked_digest(folder, index)
    except InvalidData as error:
        problems.add(error)
    has_table = "digest" in index or os.path.lexists(folder / CLASSES)  # an evaluation set needs none
    return _Expected(shards, index["num_classes"], index["num_samples"], folder / CLASSES if has_table else None)


def verify_shard(path: Path, entry: dict[str, Any], num_classes: int | None, max_pixels: int) -> ShardFindings:
    """Read a shard against its entry in the index, which may be empty, and decode its images.

    Raises:
        DataUnavailable: it cannot be read this time.
    """
    problems, labels, number, num_bytes = Problems(), Counter[int](), 0, 0
    try:
        with open_regular(path) as file:
            num_bytes = _check_bytes(file, path, entry, problems)
            for sample in walk_samples(path):
                number += 1
                where = f"{path}: sample {sample.key!r}"
                if num_classes is not None:
                    label = class_id(sample.label)
                    if label is None or label >= num_classes:
                        problems.add(f"{where} has label {sample.label[:40]!r}, not one of 0..{num_classes - 1}")
                    else:
                        labels[label] += 1
                try:
                    _decode(file, sample, max_pixels)
                except BadImage as error:
                    problems.add(f"{where} {error}")
    except InvalidData as error:
        problems.add(error)
    except OSError as error:
        raise DataUnavailable(f"{path} cannot be read: {error.strerror}") from error
    else:
        if number != entry.get("nsamples", number):
            problems.add(f"{path}: the index says {entry['nsamples']:,} samples, the shard holds {number:,}")
    return ShardFindings(problems, number, num_bytes, labels)


def _decode(file: BufferedReader, sample: Sample, max_pixels: int) -> None:
    require_plausible_size(sample.size, max_pixels)
    with open_image(os.pread(file.fileno(), sample.size, sample.offset), max_pixels) as image:
        image.load()


def _check_bytes(file: BufferedReader, path: Path, entry: dict[str, Any], problems: Problems) -> int:
    """Compare a shard's size and digest with its entry; return its size."""
    size = os.fstat(file.fileno()).st_size
    if size != entry.get("nbytes", size):
        problems.add(f"{path}: the index says {entry['nbytes']:,} bytes, the file has {size:,}")
    if entry.get("sha256"):
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != entry["sha256"]:
            problems.add(f"{path}: the index says sha256 {entry['sha256'][:16]}…, the file has {digest[:16]}…")
    return size


def _check_table(table: Path, counts: npt.NDArray[np.int64], is_whole: bool, problems: Problems) -> None:
    """Check the class table, and its counts against the labels that were found, if all samples were."""
    try:
        require_class_table(table, len(counts))
        for entry, count in zip(read_classes(table), counts.tolist(), strict=True) if is_whole else ():
            if entry.get("samples", count) != count:
                said = entry["samples"]
                problems.add(f"{table}: class {entry['id']} has {said!r} samples there, and {count:,} in the shards")
    except InvalidData as error:
        problems.add(error)
