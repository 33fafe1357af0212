"""The scripts that start runs; they lie beside this file, so that an installed package has them too."""

from __future__ import annotations

from pathlib import Path

from partialfc.errors import ConfigError

_FOLDER = Path(__file__).parent


def script(name: str) -> Path:
    """The path of one of the scripts.

    Raises:
        ConfigError: there is none of this name.
    """
    known = sorted(path.name for path in _FOLDER.iterdir() if path.suffix in (".sh", ".sbatch"))
    if name not in known:
        raise ConfigError(f"unknown script {name!r}; there are {', '.join(known)}")
    return _FOLDER / name
