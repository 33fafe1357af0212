"""Errors before the first step that a restart would only meet again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from partialfc.errors import ConfigError, DataError, DataUnavailable, MissingDependency


@contextmanager
def refusing() -> Iterator[None]:
    """Raise data, checkpoints and packages that are missing or wrong as ConfigError: the run must not be restarted."""
    try:
        yield
    except DataUnavailable:
        raise
    except (DataError, MissingDependency) as error:
        raise ConfigError(str(error)) from error
