"""Checkpoint folders on disk: which are there, which are whole, which to keep.

Nothing in them is trusted before its size and digest agree with the manifest, and DCP's own pickled index is read by an
unpickler that knows only the classes of such an index.
"""

from __future__ import annotations

import hashlib
import io
import json
import pathlib
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import filesystem as dcp_filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import Metadata

from partialfc.errors import DataError

FORMAT = 1
MANIFEST = "manifest.json"


class DamagedCheckpoint(DataError):
    """A checkpoint folder is not what its manifest says."""


def step_folders(folder: Path) -> list[Path]:
    """The checkpoint folders in ``folder``, the newest first."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        DamagedCheckpoint: it is missing or not one.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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
    return manifest


def check_file(checkpoint: Path, name: str, expected: dict[str, Any]) -> str | None:
    """What is wrong with one of its files, in words; None if nothing is."""
    path = checkpoint / name
    if Path(name).name != name:
        return f"{name} is not a plain file name"
    try:
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
        elif kept >= keep_last and not (keep_every and int(path.name[5:]) % keep_every == 0):
            # Under another name first: what is half removed must not look like a checkpoint.
            doomed = path.with_name(f".{path.name}.removed")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            removed.append(path)
    return removed


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


class _IndexUnpickler(pickle.Unpickler):
    """Builds nothing but what a DCP index is made of."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, {}):
            return _ALLOWED[module][name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's index")


class CheckedReader(FileSystemReader):
    """DCP's reader of a folder, with an index that was checked against the manifest and is read with care."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            DamagedCheckpoint: it is not one, or points outside the folder.
        """
        path = Path(self.path) / ".metadata"
        try:
            metadata = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
        except Exception as error:  # anything may be in those bytes
            raise DamagedCheckpoint(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        if not isinstance(metadata, Metadata):
            raise DamagedCheckpoint(f"{path} is not a checkpoint's index")
        for stored in (metadata.storage_data or {}).values():
            if Path(stored.relative_path).name != stored.relative_path:
                raise DamagedCheckpoint(f"{path} points outside the folder: {stored.relative_path!r}")
        if metadata.storage_meta is None:
            metadata.storage_meta = dcp_metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


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
