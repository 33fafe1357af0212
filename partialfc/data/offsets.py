"""Offsets of a data set's samples in its shards, found by one walk over the tars' headers and cached beside them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from partialfc.data.index import INDEX, Shard
from partialfc.data.samples import walk_samples
from partialfc.data.tar import BLOCK, MAX_NAME_BYTES
from partialfc.errors import DataUnavailable, InvalidData
from partialfc.files import open_regular
from partialfc.tracking.console import Progress

OFFSETS = "offsets.npz"


@dataclass(frozen=True, slots=True)
class Offsets:
    """Place and label of each sample."""

    shard: npt.NDArray[np.int32]  # [num_samples]
    offsets: npt.NDArray[np.int64]  # [num_samples], of the image in its shard
    sizes: npt.NDArray[np.int64]  # [num_samples]
    labels: npt.NDArray[np.int64]  # [num_samples]
    key_bytes: npt.NDArray[np.uint8]  # all keys, UTF-8, one after another
    key_ends: npt.NDArray[np.int64]  # [num_samples + 1]


def build_offsets(folder: Path, shards: Sequence[Shard], num_classes: int, progress: Progress) -> Offsets:
    """Walk over the headers of all shards.

    Raises:
        InvalidData: a shard is damaged or hostile, or holds other samples than the index says.
        DataUnavailable: a shard cannot be read.
    """
    shard, offsets, sizes, labels = list[int](), list[int](), list[int](), list[int]()
    keys, key_ends = bytearray(), [0]
    with progress(f"indexing {folder}", sum(entry.num_samples for entry in shards)) as advance:
        for number, entry in enumerate(shards):
            before = len(labels)
            try:
                for sample in walk_samples(entry.path):
                    if not sample.label.isdigit() or len(sample.label) > 20:
                        raise InvalidData(
                            f"{entry.path}: label of sample {sample.key!r} must be a class id, got {sample.label!r}"
                        )
                    label = int(sample.label)
                    if label >= num_classes:
                        raise InvalidData(
                            f"{entry.path}: sample {sample.key!r} has label {label} (index {len(labels)}), "
                            f"but the data set has classes 0..{num_classes - 1}"
                        )
                    shard.append(number)
                    offsets.append(sample.offset)
                    sizes.append(sample.size)
                    labels.append(label)
                    keys += sample.key.encode()
                    key_ends.append(len(keys))
            except OSError as error:
                raise DataUnavailable(f"{entry.path} cannot be read: {error.strerror}") from error
            if len(labels) - before != entry.num_samples:
                found = len(labels) - before
                raise InvalidData(f"{entry.path}: {INDEX} says {entry.num_samples} samples, the shard holds {found}")
            advance(entry.num_samples)
    return Offsets(
        np.array(shard, dtype=np.int32),
        np.array(offsets, dtype=np.int64),
        np.array(sizes, dtype=np.int64),
        np.array(labels, dtype=np.int64),
        np.frombuffer(bytes(keys), dtype=np.uint8),
        np.array(key_ends, dtype=np.int64),
    )


def save_offsets(folder: Path, offsets: Offsets, shards: Sequence[Shard], digest: str) -> None:
    """Cache offsets in the folder, if it can be written: otherwise every start finds them anew, in memory."""
    temporary = folder / f"{OFFSETS}.{os.getpid()}.tmp"
    arrays = {field.name: getattr(offsets, field.name) for field in fields(Offsets)}
    with suppress(OSError):  # a read-only file system refuses to remove even what is not there
        try:
            temporary.unlink(missing_ok=True)
            # Streamed: `files.write_atomically` would need the whole archive in memory beside its arrays. Nor is it
            # synced to the disk: an index that a crash tears is found to be damaged, and built again.
            with open(temporary, "xb") as file:
                np.savez(file, digest=np.array(digest), stamps=_stamps(shards), **arrays)
            temporary.replace(folder / OFFSETS)
        finally:
            temporary.unlink(missing_ok=True)


def load_offsets(folder: Path, shards: Sequence[Shard], num_classes: int, digest: str) -> Offsets | None:
    """Return the cached offsets; None if they are missing, damaged, or of other shards."""
    try:
        with open_regular(folder / OFFSETS) as file:
            if os.fstat(file.fileno()).st_size > _largest_size(shards):
                return None
            with np.lib.npyio.NpzFile(file, allow_pickle=False) as arrays:
                assert arrays.zip is not None
                # What is not compressed unpacks to no more than the file, whose size is known.
                if any(info.compress_type != zipfile.ZIP_STORED for info in arrays.zip.infolist()):
                    return None
                if str(arrays["digest"]) != digest or not np.array_equal(arrays["stamps"], _stamps(shards)):
                    return None
                offsets = Offsets(**{field.name: arrays[field.name] for field in fields(Offsets)})
        return offsets if _is_valid(offsets, shards, num_classes) else None
    except Exception:  # whatever is wrong with it, the index is built anew
        return None


def _stamps(shards: Sequence[Shard]) -> npt.NDArray[np.int64]:
    """Return size, modification time and inode of each shard, int64 [shards, 3]: a swapped or edited one differs."""
    stamps = [(shard.num_bytes, shard.modified, shard.inode % 2**63) for shard in shards]
    return np.array(stamps, dtype=np.int64).reshape(-1, 3)


def _largest_size(shards: Sequence[Shard]) -> int:
    # An image and a label have a header each, whatever number of samples the index claims.
    samples = sum(min(shard.num_samples, shard.num_bytes // (2 * BLOCK)) for shard in shards)
    return samples * (4 + 4 * 8 + MAX_NAME_BYTES) + len(shards) * 3 * 8 + (1 << 16)


def _is_valid(offsets: Offsets, shards: Sequence[Shard], num_classes: int) -> bool:
    n = sum(shard.num_samples for shard in shards)
    kinds = {"shard": np.int32, "key_bytes": np.uint8}
    for field in fields(Offsets):
        name, array = field.name, getattr(offsets, field.name)
        if array.ndim != 1 or array.dtype != kinds.get(name, np.int64):
            return False
        if name != "key_bytes" and len(array) != n + (name == "key_ends"):
            return False
    if n == 0:
        return True
    counts = np.bincount(offsets.shard.clip(0, len(shards)), minlength=len(shards)).tolist()
    ends = np.array([shard.num_bytes for shard in shards], dtype=np.int64)
    return bool(
        offsets.shard.min() >= 0
        and counts == [shard.num_samples for shard in shards]
        and offsets.offsets.min() >= 0
        and offsets.sizes.min() >= 0
        and (offsets.sizes <= ends[offsets.shard] - offsets.offsets).all()
        and 0 <= offsets.labels.min() <= offsets.labels.max() < num_classes
        and offsets.key_ends[0] == 0
        and (np.diff(offsets.key_ends) > 0).all()
        and offsets.key_ends[-1] == len(offsets.key_bytes)
    )
