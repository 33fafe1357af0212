"""``manifest.json``: size and digest of every file of a checkpoint, and all state that is not a tensor."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from partialfc.errors import DamagedCheckpoint
from partialfc.files import open_regular, read_json

FORMAT = 1
MANIFEST = "manifest.json"
_MAX_MANIFEST = 1 << 26  # bytes: 500,000 files


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint folder.

    Raises:
        DamagedCheckpoint: it is missing, modified, or not a manifest.
    """
    try:
        manifest = read_json(checkpoint / MANIFEST, _MAX_MANIFEST)
    except OSError as error:
        raise DamagedCheckpoint(f"{checkpoint}: {MANIFEST} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DamagedCheckpoint(f"{checkpoint}: {MANIFEST} cannot be read ({error})") from error
    if not _is_manifest(manifest):
        raise DamagedCheckpoint(f"{checkpoint}: {MANIFEST} is not a checkpoint's manifest")
    if manifest.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{checkpoint} has format {manifest.get('format')}; this version reads {FORMAT}")
    if manifest.get("digest") != manifest_digest(manifest):
        raise DamagedCheckpoint(f"{checkpoint}: {MANIFEST} was modified (digest mismatch)")
    found: dict[str, Any] = manifest
    return found


def _is_manifest(manifest: Any) -> bool:
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return False
    described = all(
        isinstance(file, dict) and isinstance(file.get("bytes"), int) and isinstance(file.get("sha256"), str)
        for file in manifest["files"].values()
    )
    counted = all(isinstance(manifest.get(name), int) for name in ("step", "samples"))
    return described and counted and ".metadata" in manifest["files"]


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Return the digest of a manifest without its digest field, so that a changed step counts as damage."""
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """Return size and digest of a file, as a manifest lists them."""
    with open_regular(path) as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_file(checkpoint: Path, name: str, expected: dict[str, Any]) -> str | None:
    """Return the mismatch between a file and its manifest entry, or None."""
    path = checkpoint / name
    if Path(name).name != name or "\0" in name:
        return f"{name!r} is not a plain file name"
    try:
        if path.is_symlink():
            return f"{name} is a symbolic link"
        if path.exists() and not path.is_file():
            return f"{name} is not a file"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
        found = describe_file(path)
    except OSError as error:
        return f"{name}: {error.strerror}"
    return None if found["sha256"] == expected["sha256"] else f"{name} was modified (digest mismatch)"


def verify(checkpoint: Path) -> dict[str, Any]:
    """Read every file of a checkpoint folder, and return its manifest.

    Raises:
        DamagedCheckpoint: a file is missing or modified.
    """
    manifest = read_manifest(checkpoint)
    files: dict[str, dict[str, Any]] = manifest["files"]
    problems = [problem for name in files if (problem := check_file(checkpoint, name, files[name]))]
    if problems:
        raise DamagedCheckpoint(f"{checkpoint}: {'; '.join(problems)}")
    return manifest
