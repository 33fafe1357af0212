"""Reader of untrusted checkpoints.

No file is trusted before its size and digest match the manifest. DCP's own index is a pickle: an unpickler restricted
to the classes of such an index reads it, and it is refused unless every tensor lies whole in the listed files.
"""

from __future__ import annotations

import io
import math
import pathlib
import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import filesystem as dcp_filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from partialfc.checkpoint.manifest import check_file, read_manifest, verify
from partialfc.errors import DamagedCheckpoint

_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
_INDEX_CLASSES: tuple[type, ...] = (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
    dcp_filesystem._StorageInfo,
)
_OTHERS_IN_AN_INDEX = (dcp_metadata.BytesStorageMetadata, dcp_metadata._MEM_FORMAT_ENCODING)


def _memory_format(kind: type, name: str) -> Any:
    """Replace ``getattr``, with which Python before 3.11.4 pickles members of an enumeration."""
    if kind is not dcp_metadata._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"{kind!r} is not an enumeration of a checkpoint's index")
    return dcp_metadata._MEM_FORMAT_ENCODING[name]


_PATHS = {"PosixPath": pathlib.PurePosixPath, "PurePosixPath": pathlib.PurePosixPath}
_ALLOWED: dict[tuple[str, str], Any] = {
    **{(kind.__module__, kind.__name__): kind for kind in (*_INDEX_CLASSES, *_OTHERS_IN_AN_INDEX)},
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _DTYPES},
    ("torch", "Size"): torch.Size,
    ("builtins", "getattr"): _memory_format,
    ("torch.serialization", "_get_layout"): lambda name: {"torch.strided": torch.strided}[name],
    **{("pathlib", name): kind for name, kind in _PATHS.items()},
    **{("pathlib._local", name): kind for name, kind in _PATHS.items()},  # its module since Python 3.13
}


class _IndexUnpickler(pickle._Unpickler):
    """Unpickler restricted to the classes of a DCP index.

    Derives from the pure-Python unpickler, whose instructions can be overridden: only instances of the index's classes
    get attributes. The C unpickler would set them on classes too, and a file could change ``pathlib`` for the whole
    process.
    """

    stack: list[Any]

    def _set_attributes(self) -> None:
        if type(self.stack[-2]) not in _INDEX_CLASSES:
            raise pickle.UnpicklingError(f"{self.stack[-2]!r} must not be given attributes")
        set_attributes: Any = pickle._Unpickler.dispatch[pickle.BUILD[0]]
        set_attributes(self)

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _set_attributes}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint's index")


class CheckedReader(FileSystemReader):
    """DCP's reader of a checkpoint folder whose files were checked against the manifest."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index.

        Raises:
            DamagedCheckpoint: it is not an index, points outside the folder or to a file that the manifest does not
                list, or promises tensors that the files cannot hold.
        """
        path = Path(self.path) / ".metadata"
        files = read_manifest(path.parent)["files"]
        try:
            metadata = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
        except Exception as error:  # the bytes may hold anything
            raise DamagedCheckpoint(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        try:
            problem = _find_problem(metadata, files)
        except (AttributeError, TypeError, ValueError, IndexError) as error:  # fields of the wrong type
            problem = f"is not a checkpoint's index ({error})"
        if problem:
            raise DamagedCheckpoint(f"{path} {problem}")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        found: Metadata = metadata
        return found


def _find_problem(metadata: Any, files: dict[str, dict[str, Any]]) -> str | None:
    """Return the reason an index cannot be loaded, or None. Each tensor must lie whole in the listed files."""
    if not isinstance(metadata, Metadata):
        return "is not a checkpoint's index"
    places: dict[Any, Any] = metadata.storage_data
    for place in places.values():
        if Path(place.relative_path).name != place.relative_path:
            return f"points outside the folder: {place.relative_path!r}"
        if place.relative_path not in files:
            return f"points to {place.relative_path}, which the manifest does not list"
        if place.transform_descriptors or place.offset < 0:
            return f"does not say where in {place.relative_path} a tensor lies"
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            return f"holds {name}, which is not a tensor"
        if not isinstance(entry.properties.dtype, torch.dtype) or not _is_covered(entry.size, entry.chunks):
            return f"does not hold the whole of {name}"
        for chunk in entry.chunks:
            stored = places.get(MetadataIndex(name, chunk.offsets))
            size = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
            if size and (stored is None or not size <= stored.length <= files[stored.relative_path]["bytes"]):
                return f"promises more of {name} than the files hold"
    return None


def _is_covered(size: torch.Size, chunks: list[ChunkStorageMetadata]) -> bool:
    """Return True if ``chunks`` cover the rows of a tensor of this ``size`` exactly once."""
    if len(size) == 0:
        return len(chunks) == 1
    end = 0
    for chunk in sorted((chunk for chunk in chunks if 0 not in chunk.sizes), key=lambda chunk: chunk.offsets[0]):
        if chunk.offsets[0] != end or any(chunk.offsets[1:]) or chunk.sizes[1:] != size[1:] or chunk.sizes[0] < 0:
            return False
        end += chunk.sizes[0]
    return 0 in size or end == size[0]


def stored_tensors(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    """Return shape, dtype and parts of each tensor of a checkpoint, by name.

    Raises:
        DamagedCheckpoint: its index cannot be trusted.
    """
    stored = CheckedReader(checkpoint).read_metadata().state_dict_metadata
    return {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


def describe(checkpoint: Path, digests: bool = True) -> list[str]:
    """Describe a checkpoint folder in printable lines, without reading tensors.

    Args:
        digests: check the digests of all files; otherwise only the index's.

    Raises:
        DamagedCheckpoint: it is not a checkpoint, or a file was modified.
    """
    manifest = verify(checkpoint) if digests else read_manifest(checkpoint)
    files: dict[str, dict[str, Any]] = manifest["files"]
    if not digests and (problem := check_file(checkpoint, ".metadata", files[".metadata"])):
        raise DamagedCheckpoint(f"{checkpoint}: {problem}")
    total = sum(file["bytes"] for file in files.values())
    config = manifest.get("config", {})
    lines = [
        f"step {manifest['step']:,}, {manifest.get('samples', 0):,} samples seen, written on "
        f"{manifest.get('world_size', '?')} ranks by partialfc {manifest.get('partialfc', '?')}, "
        f"torch {manifest.get('torch', '?')}",
        f"{manifest.get('num_classes', 0):,} classes, {len(files)} files, {total / 2**20:,.1f} MiB"
        + (", all digests match" if digests else ""),
        f"model {config.get('model', {}).get('name', '?')}, loss {config.get('head', {}).get('loss', '?')}",
    ]
    for name, entry in sorted(stored_tensors(checkpoint).items()):
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        parts = f", in {len(entry.chunks)} parts" if len(entry.chunks) > 1 else ""
        lines.append(f"  {name}  {list(entry.size)} {dtype}{parts}")
    return lines
