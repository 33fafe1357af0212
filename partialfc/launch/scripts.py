"""Paths of the shell scripts beside this file, which start runs."""

from __future__ import annotations

from pathlib import Path

from partialfc.errors import ConfigError

_FOLDER = Path(__file__).parent


def script(name: str) -> Path:
    """Return the path of a script.

    Raises:
        ConfigError: there is no script of this name.
    """
    known = sorted(path.name for path in _FOLDER.iterdir() if path.suffix in (".sh", ".sbatch"))
    if name not in known:
        raise ConfigError(f"unknown script {name!r}; there are {', '.join(known)}")
    return _FOLDER / name
