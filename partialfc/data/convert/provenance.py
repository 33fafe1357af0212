"""Where a data set comes from, for its index: the source, its licence, and what was taken from it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from partialfc.data.convert.plan import Selection
from partialfc.errors import ConfigError, InvalidData
from partialfc.files import open_regular, read_bounded

_LICENCES = ("LICENSE", "LICENCE", "COPYING", "README-LICENSE", "README-LICENCE")
_SUFFIXES = ("", ".txt", ".md")
_MAX_LICENCE_BYTES = 64 << 10


def describe_source(kind: str, origin: Path) -> dict[str, Any]:
    """Return kind and name of a source and, if a file beside its data has one, the text of its licence."""
    about = {"kind": kind, "name": _name(origin)}
    licence = _find_licence(origin if origin.is_dir() else origin.parent)
    return about if licence is None else about | {"licence": licence}


def describe_selection(selection: Selection) -> dict[str, Any]:
    """Return what is selected as JSON; of files, name and SHA-256.

    Raises:
        InvalidData: a file cannot be read.
    """
    values = ((field.name, getattr(selection, field.name)) for field in fields(selection))
    return {name: _describe_file(value) if isinstance(value, Path) else value for name, value in values}


def require_apart(origin: Path, selection: Selection, out: Path) -> None:
    """Raise a ConfigError if source and target lie in one another, or a list lies in the target, which is replaced."""
    source, target = origin.resolve(), out.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise ConfigError(f"--out {out} and the source {origin} lie in one another; choose another folder to write")
    for name, value in vars(selection).items():
        if isinstance(value, Path) and value.resolve().is_relative_to(target):
            raise ConfigError(f"--{name} {value} lies in --out, whose files are replaced; copy it to another place")


def _name(path: Path) -> str:
    """Return the name of a file or folder; it may hold bytes that are no text, and an index may not."""
    return os.fsencode(path.absolute().name).decode(errors="backslashreplace")


def _describe_file(path: Path) -> dict[str, str]:
    try:
        with open_regular(path) as file:
            digest = hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise InvalidData(f"{path} cannot be read: {error.strerror}") from error
    return {"name": _name(path), "sha256": digest.hexdigest()}


def _find_licence(folder: Path) -> str | None:
    # Looked for by name: the folder itself may have millions.
    names = (case(base) + suffix for base in _LICENCES for suffix in _SUFFIXES for case in (str, str.lower, str.title))
    for name in names:
        try:
            return read_bounded(folder / name, _MAX_LICENCE_BYTES).decode(errors="replace")
        except OSError:  # most are not there; one that cannot be read is none
            continue
    return None
