"""Errors before the first step that a restart would only meet again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from partialfc.errors import ConfigError, DamagedCheckpoint, MissingDependency


@contextmanager
def refusing() -> Iterator[None]:
    """Raise damaged checkpoints and missing packages as ConfigError: the run must not be restarted."""
    try:
        yield
    except (DamagedCheckpoint, MissingDependency) as error:
        raise ConfigError(str(error)) from error
