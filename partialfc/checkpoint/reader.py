"""Reader of untrusted checkpoints.

No file is trusted before its size and digest match the manifest. DCP's own index is a pickle: an unpickler restricted
to the classes of such an index reads it, and it is refused unless every tensor lies whole in the listed files.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from types import NoneType
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

from partialfc.checkpoint.folders import find_checkpoint, is_checkpoint, newest
from partialfc.checkpoint.manifest import check_file, read_manifest
from partialfc.errors import DamagedCheckpoint
from partialfc.files import read_bounded

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
_MAX_INDEX = 1 << 26  # bytes of a DCP index: 300,000 parts of tensors
_MAX_DIMENSIONS = 64


def _size(sizes: Any = ()) -> torch.Size:
    """Replace ``torch.Size``: a long tuple, repeated by reference, would take time and memory without end."""
    if len(sizes) > _MAX_DIMENSIONS:
        raise pickle.UnpicklingError(f"a tensor of {len(sizes):,} dimensions")
    return torch.Size(sizes)


def _memory_format(value: Any) -> Any:
    """Replace the enumeration of memory formats, which would hash whatever it is given."""
    if type(value) is not int:
        raise pickle.UnpicklingError("a memory format is a number")
    return dcp_metadata._MEM_FORMAT_ENCODING(value)


def _memory_format_by_name(kind: Any, name: Any) -> Any:
    """Replace ``getattr``, with which Python before 3.11.4 pickles members of an enumeration."""
    if kind is not _memory_format or type(name) is not str:
        raise pickle.UnpicklingError(f"{type(kind).__name__} is not an enumeration of a checkpoint's index")
    return dcp_metadata._MEM_FORMAT_ENCODING[name]


def _layout(name: Any) -> torch.layout:
    if name != "torch.strided":
        raise pickle.UnpicklingError("a checkpoint holds dense tensors only")
    return torch.strided


def _path(*parts: Any) -> None:
    """Replace the path that the checkpoint was written to, which nobody needs."""


_ALLOWED: dict[tuple[str, str], Any] = {
    **{(kind.__module__, kind.__name__): kind for kind in (*_INDEX_CLASSES, dcp_metadata.BytesStorageMetadata)},
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _DTYPES},
    ("torch", "Size"): _size,
    (dcp_metadata.__name__, dcp_metadata._MEM_FORMAT_ENCODING.__name__): _memory_format,
    ("builtins", "getattr"): _memory_format_by_name,
    ("torch.serialization", "_get_layout"): _layout,
    **{(module, name): _path for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")},
}


_NOT_IN_AN_INDEX = (
    *(pickle.DICT, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET),
    *(pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX),
)


class _IndexUnpickler(pickle._Unpickler):
    """Unpickler restricted to the classes of a DCP index.

    Derives from the pure-Python unpickler, whose instructions can be overridden: only instances of the index's classes
    get attributes. The C unpickler would set them on classes too, and a file could change ``pathlib`` for the whole
    process. Only names and the index's own keys are hashed: the hash of a tuple that holds another one twice, and so
    on sixty times, never ends, and that of a million nested ones overflows the stack.
    """

    stack: list[Any]

    def _set_attributes(self) -> None:
        if type(self.stack[-2]) not in _INDEX_CLASSES:
            raise pickle.UnpicklingError(f"{_name(self.stack[-2])} must not be given attributes")
        if type(self.stack[-2]) is TensorProperties:
            _require_properties(self.stack[-1])
        _original(pickle.BUILD)(self)

    def _call(self) -> None:
        if isinstance(self.stack[-2], type):  # instances are made by NEWOBJ
            raise pickle.UnpicklingError(f"{_name(self.stack[-2])} must not be called")
        _original(pickle.REDUCE)(self)

    def _set_item(self) -> None:
        _require_key(self.stack[-2])
        _original(pickle.SETITEM)(self)

    def _set_items(self) -> None:
        for key in self.stack[::2]:
            _require_key(key)
        _original(pickle.SETITEMS)(self)

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("an instruction that no index of a checkpoint needs")

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: _set_attributes,
        pickle.REDUCE[0]: _call,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        **dict.fromkeys((code[0] for code in _NOT_IN_AN_INDEX), _refuse),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint's index")


def _original(code: bytes) -> Any:
    return pickle._Unpickler.dispatch[code[0]]


def _name(found: Any) -> str:
    return found.__name__ if isinstance(found, type) else f"a {type(found).__name__}"


def _require_properties(state: Any) -> None:
    """Raise UnpicklingError for a state with another memory format, which torch would print in full."""
    if type(state) is not tuple or len(state) != 5 or type(state[3]) is not dcp_metadata._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError("properties that are not a tensor's")


def _require_key(key: Any) -> None:
    """Raise UnpicklingError unless ``key`` is a name, or a key of the index, of plain fields."""
    if type(key) is MetadataIndex:
        fields = vars(key)
        plain = type(fields.get("fqn")) is str and type(fields.get("index")) in (int, NoneType)
        if plain and type(fields.get("offset")) in (torch.Size, NoneType):
            return
    elif type(key) is str:
        return
    raise pickle.UnpicklingError("a key that is not a name")


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
            metadata = _IndexUnpickler(io.BytesIO(read_bounded(path, _MAX_INDEX))).load()
        except OSError as error:
            raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from error
        except Exception as error:  # the bytes may hold anything
            raise DamagedCheckpoint(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        try:
            problem = _find_problem(metadata, files)
        except (AttributeError, TypeError, ValueError, IndexError) as error:  # fields of the wrong type
            problem = f"is not a checkpoint's index ({error})"
        if problem:
            raise DamagedCheckpoint(f"{path} {problem}")
        return Metadata(
            state_dict_metadata=metadata.state_dict_metadata,
            storage_data=metadata.storage_data,
            storage_meta=StorageMeta(load_id=self.load_id),
        )


def _find_problem(metadata: Any, files: dict[str, dict[str, Any]]) -> str | None:
    """Return the reason an index cannot be loaded, or None. Each tensor must lie whole in the listed files."""
    if not isinstance(metadata, Metadata):
        return "is not a checkpoint's index"
    places: dict[Any, Any] = metadata.storage_data
    for place in places.values():
        if type(place.relative_path) is not str or type(place.offset) is not int or type(place.length) is not int:
            return "is not a checkpoint's index (a place is not a file, an offset and a length)"
        if Path(place.relative_path).name != place.relative_path:
            return f"points outside the folder: {place.relative_path!r}"
        if place.relative_path not in files:
            return f"points to {place.relative_path}, which the manifest does not list"
        if place.transform_descriptors or place.offset < 0:
            return f"does not say where in {place.relative_path} a tensor lies"
    for name, entry in metadata.state_dict_metadata.items():
        if type(name) is not str:
            return "is not a checkpoint's index (a tensor without a name)"
        if not isinstance(entry, TensorStorageMetadata):
            return f"holds {name}, which is not a tensor"
        sizes = [entry.size, *(size for chunk in entry.chunks for size in (chunk.offsets, chunk.sizes))]
        if not all(type(size) is torch.Size for size in sizes):
            return f"gives {name} a size that is none"
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


def class_count(checkpoint: Path, manifest: dict[str, Any]) -> int:
    """Return the number of classes of a checkpoint, of which it holds every row.

    Raises:
        DamagedCheckpoint: the manifest gives another number.
    """
    weight = stored_tensors(checkpoint).get("head.weight")
    rows = weight.size[0] if weight and weight.size else 0
    if manifest.get("num_classes") != rows:
        raise DamagedCheckpoint(
            f"{checkpoint}: its manifest gives {manifest.get('num_classes')} classes, its head {rows}"
        )
    return rows


def describe(path: Path, digests: bool = True) -> list[str]:
    """Describe a checkpoint, or the newest one of a run folder, in printable lines, without reading tensors.

    Args:
        digests: check the digests of all files; otherwise only the index's.

    Raises:
        ConfigError: ``path`` is neither.
        DamagedCheckpoint: a file was modified.
    """
    if digests:
        checkpoint, manifest = find_checkpoint(path)
    else:
        checkpoint = path if is_checkpoint(path) else newest(path)
        manifest = read_manifest(checkpoint)
    files: dict[str, dict[str, Any]] = manifest["files"]
    if not digests and (problem := check_file(checkpoint, ".metadata", files[".metadata"])):
        raise DamagedCheckpoint(f"{checkpoint}: {problem}")
    total = sum(file["bytes"] for file in files.values())
    config = manifest.get("config", {})
    lines = [] if checkpoint == path else [str(checkpoint)]
    lines += [
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
