"""Checkpoint folders on disk: which are there, which are whole, which to keep.

Nothing in them is trusted before its size and digest agree with the manifest, and DCP's own pickled index is read by an
unpickler that knows only the classes of such an index.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import pathlib
import pickle
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import filesystem as dcp_filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import Metadata

from partialfc.errors import CheckpointFailed, DataError

FORMAT = 1
MANIFEST = "manifest.json"
REPLACED = ".replaced"  # ends the hidden name of a checkpoint while another one of its step takes its place


class DamagedCheckpoint(DataError):
    """A checkpoint folder is not what its manifest says."""


def step_folders(folder: Path) -> list[Path]:
    """The checkpoint folders in ``folder``, the newest first."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        DamagedCheckpoint: it is missing or not one.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{checkpoint}: its manifest cannot be read ({error})") from error
    files = manifest.get("files") if isinstance(manifest, dict) else None
    whole = isinstance(files, dict) and all(
        isinstance(file, dict) and isinstance(file.get("bytes"), int) and isinstance(file.get("sha256"), str)
        for file in files.values()
    )
    counts = all(isinstance(manifest.get(name), int) for name in ("step", "samples")) if whole else False
    if not whole or not counts or ".metadata" not in manifest["files"]:
        raise DamagedCheckpoint(f"{checkpoint}: its manifest is not one of a checkpoint")
    if manifest.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{checkpoint} has format {manifest.get('format')}; this version reads {FORMAT}")
    if manifest.get("digest") != manifest_digest(manifest):
        raise DamagedCheckpoint(f"{checkpoint}: its manifest has another digest than when it was written")
    return manifest


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Of everything that a manifest says, but for this digest itself: a step that has changed is damage, too."""
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_file(checkpoint: Path, name: str, expected: dict[str, Any]) -> str | None:
    """What is wrong with one of its files, in words; None if nothing is."""
    path = checkpoint / name
    if Path(name).name != name:
        return f"{name} is not a plain file name"
    try:
        if not path.is_symlink() and path.exists() and not path.is_file():
            return f"{name} is not a file"
        if path.is_symlink() or path.stat().st_size != expected["bytes"]:
            size = "a link" if path.is_symlink() else f"{path.stat().st_size:,} bytes"
            return f"{name} is {size}, not {expected['bytes']:,} bytes"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{name}: {error.strerror}"
    return None if digest == expected["sha256"] else f"{name} has another digest than when it was written"


def verify(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder whose files are all as they were written.

    Raises:
        DamagedCheckpoint: one is not.
    """
    manifest = read_manifest(checkpoint)
    files: dict[str, dict[str, Any]] = manifest["files"]
    problems = [problem for name in files if (problem := check_file(checkpoint, name, files[name]))]
    if problems:
        raise DamagedCheckpoint(f"{checkpoint}: {'; '.join(problems)}")
    return manifest


def prune(folder: Path, keep_last: int, keep_every: int) -> list[Path]:
    """Remove old checkpoints but the ``keep_last`` newest whole ones and those at multiples of ``keep_every`` steps
    (0: none for being one). Returns what was removed.
    """
    kept, removed = 0, []
    for path in step_folders(folder):
        if (path / MANIFEST).exists() and kept < keep_last:
            kept += 1
        elif kept >= keep_last and not (keep_every and int(path.name[5:]) and int(path.name[5:]) % keep_every == 0):
            # Under another name first: what is half removed must not look like a checkpoint.
            doomed = path.with_name(f".{path.name}.removed")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            removed.append(path)
    return removed


def undo_half_a_replacement(folder: Path) -> None:
    """Give a checkpoint its name back whose place was to be taken when the run was killed."""
    for replaced in folder.glob(f".step-*{REPLACED}"):
        path = replaced.with_name(replaced.name[1 : -len(REPLACED)])
        if not path.exists():
            with suppress(OSError):  # nobody may write here; the others are used
                replaced.rename(path)


def set_aside(folder: Path, after: int) -> list[Path]:
    """Rename the checkpoints of steps beyond ``after``, damaged or no longer wanted; nothing is removed.

    These steps are done again, and what is written then must not count as older. Returns the new places.

    Raises:
        CheckpointFailed: one cannot be renamed.
    """
    places = []
    for path in step_folders(folder):
        if int(path.name[5:]) > after:
            names = (path.with_name(f"aside-{number}-{path.name}") for number in itertools.count(1))
            place = next(name for name in names if not name.exists())
            try:
                path.rename(place)
            except OSError as error:
                raise CheckpointFailed(f"{path} cannot be set aside: {error.strerror}; rename it yourself") from error
            places.append(place)
    return places


_ALLOWED: dict[str, dict[str, Any]] = {
    "torch.distributed.checkpoint.metadata": {
        name: getattr(dcp_metadata, name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo": dcp_filesystem._StorageInfo},
    "torch": {
        "Size": torch.Size,
        **{str(kind).removeprefix("torch."): kind for kind in (torch.float32, torch.float64, torch.bfloat16)},
        **{str(kind).removeprefix("torch."): kind for kind in (torch.float16, torch.int64, torch.int32, torch.bool)},
        **{str(kind).removeprefix("torch."): kind for kind in (torch.uint8, torch.int8, torch.int16)},
    },
    "torch.serialization": {"_get_layout": lambda name: {"torch.strided": torch.strided}[name]},
    "pathlib": {"PosixPath": pathlib.PurePosixPath, "PurePosixPath": pathlib.PurePosixPath},
}
_ALLOWED["pathlib._local"] = _ALLOWED["pathlib"]  # its name since Python 3.13


_FILLED = (
    dcp_metadata.ChunkStorageMetadata,
    dcp_metadata.Metadata,
    dcp_metadata.MetadataIndex,
    dcp_metadata.StorageMeta,
    dcp_metadata.TensorProperties,
    dcp_metadata.TensorStorageMetadata,
    dcp_filesystem._StorageInfo,
)


class _IndexUnpickler(pickle._Unpickler):
    """Builds nothing but what a DCP index is made of.

    It is the one in Python, whose instructions can be overridden: filling an object with attributes is for instances of
    the index only. The one in C would fill classes too, so that a file could change ``pathlib`` for the whole process.
    """

    stack: list[Any]

    def _fill(self) -> None:
        if type(self.stack[-2]) not in _FILLED:
            raise pickle.UnpicklingError(f"{self.stack[-2]!r} is not to be filled with attributes")
        fill: Any = pickle._Unpickler.dispatch[pickle.BUILD[0]]
        fill(self)

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _fill}

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, {}):
            return _ALLOWED[module][name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's index")


class CheckedReader(FileSystemReader):
    """DCP's reader of a folder, with an index that was checked against the manifest and is read with care."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            DamagedCheckpoint: it is not one, points outside the folder or to a file that the manifest does not list, or
                promises tensors that the files cannot hold.
        """
        path = Path(self.path) / ".metadata"
        files = read_manifest(path.parent)["files"]
        try:
            metadata = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
        except Exception as error:  # anything may be in those bytes
            raise DamagedCheckpoint(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        try:
            problem = _wrong_with(metadata, files)
        except (AttributeError, TypeError, ValueError, IndexError) as error:  # not even of the right types
            problem = f"is not a checkpoint's index ({error})"
        if problem:
            raise DamagedCheckpoint(f"{path} {problem}")
        if metadata.storage_meta is None:
            metadata.storage_meta = dcp_metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _wrong_with(metadata: Any, files: dict[str, dict[str, Any]]) -> str | None:
    """What makes an index one that cannot be loaded, in words: each tensor must lie in the listed files, whole."""
    if not isinstance(metadata, Metadata):
        return "is not a checkpoint's index"
    places: dict[Any, Any] = metadata.storage_data
    for place in places.values():
        if Path(place.relative_path).name != place.relative_path:
            return f"points outside the folder: {place.relative_path!r}"
        if place.relative_path not in files:
            return f"points to {place.relative_path}, which the manifest does not list"
        if place.transform_descriptors or place.offset < 0:
            return f"does not say where in {place.relative_path} something lies"
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, dcp_metadata.TensorStorageMetadata):
            return f"holds {name}, which is not a tensor"
        if not isinstance(entry.properties.dtype, torch.dtype) or not _is_covered(entry.size, entry.chunks):
            return f"does not hold the whole of {name}"
        for chunk in entry.chunks:
            stored = places.get(dcp_metadata.MetadataIndex(name, chunk.offsets))
            size = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
            if size and (stored is None or not size <= stored.length <= files[stored.relative_path]["bytes"]):
                return f"promises more of {name} than the files hold"
    return None


def _is_covered(size: torch.Size, chunks: list[dcp_metadata.ChunkStorageMetadata]) -> bool:
    """Whether ``chunks`` are the rows of a tensor of this ``size``, each once."""
    if len(size) == 0:
        return len(chunks) == 1
    end = 0
    for chunk in sorted((chunk for chunk in chunks if 0 not in chunk.sizes), key=lambda chunk: chunk.offsets[0]):
        if chunk.offsets[0] != end or any(chunk.offsets[1:]) or chunk.sizes[1:] != size[1:] or chunk.sizes[0] < 0:
            return False
        end += chunk.sizes[0]
    return 0 in size or end == size[0]


def describe(checkpoint: Path, digests: bool = True) -> list[str]:
    """What a checkpoint folder holds, in lines for people; no tensor is read.

    Raises:
        DamagedCheckpoint: it is not one, or with ``digests`` a file is not as it was written.
    """
    manifest = verify(checkpoint) if digests else read_manifest(checkpoint)
    files: dict[str, dict[str, Any]] = manifest["files"]
    if not digests:
        check = check_file(checkpoint, ".metadata", files[".metadata"])
        if check:
            raise DamagedCheckpoint(f"{checkpoint}: {check}")
    total = sum(file["bytes"] for file in files.values())
    config = manifest.get("config", {})
    lines = [
        f"step {manifest['step']:,}, {manifest.get('samples', 0):,} samples seen, written on "
        f"{manifest.get('world_size', '?')} ranks by partialfc {manifest.get('partialfc', '?')}, "
        f"torch {manifest.get('torch', '?')}",
        f"{manifest.get('num_classes', 0):,} classes, {len(files)} files, {total / 2**20:,.1f} MiB"
        + (", all as they were written" if digests else ""),
        f"model {config.get('model', {}).get('name', '?')}, loss {config.get('head', {}).get('loss', '?')}",
    ]
    stored = CheckedReader(checkpoint).read_metadata().state_dict_metadata
    for name, entry in sorted(stored.items()):
        if isinstance(entry, dcp_metadata.TensorStorageMetadata):
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            parts = f", in {len(entry.chunks)} parts" if len(entry.chunks) > 1 else ""
            lines.append(f"  {name}  {list(entry.size)} {dtype}{parts}")
    return lines
