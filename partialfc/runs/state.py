"""``state.json``: the state of a run, written atomically by one process at a time."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from partialfc.files import read_json, write_atomically

STATE = "state.json"
_MOST_BYTES = 1 << 20


def read_state(folder: Path) -> dict[str, Any] | None:
    """Return a run's ``state.json``, or None if it is missing or damaged."""
    try:
        return parse_state(folder)
    except (OSError, ValueError):
        return None


def parse_state(folder: Path) -> dict[str, Any]:
    """Return a run's ``state.json``.

    Raises:
        OSError: it cannot be read, or is not a regular file of a plausible size.
        ValueError: it does not hold a state; the message says why not.
    """
    state = read_json(folder / STATE, _MOST_BYTES)
    if not isinstance(state, dict) or not isinstance(state.get("state"), str):
        raise ValueError("it holds no state of a run")
    return state


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Replace a run's ``state.json``.

    Raises:
        OSError: it cannot be written; the old one is unchanged.
    """
    write_atomically(folder / STATE, _to_json(state))


def record_failure(
    folder: Path, reason: str, states: tuple[str, ...] = ("running",), *, given_up: bool = False
) -> None:
    """Mark a run as failed without its :class:`RunFolder`: the launcher may end rank 0 before it can.

    Args:
        states: states that a failure replaces; a run in any other state is left alone.
        given_up: the run must not be restarted automatically.
    """
    state = read_state(folder)
    if state is not None and state.get("state") in states:
        state |= {"state": "failed", "reason": reason, "stopped_by": None, "updated": round(time.time(), 3)}
        if given_up:
            state["given_up"] = True
        with suppress(OSError):
            write_state(folder, state)
            tell_launcher(state)


def tell_launcher(state: dict[str, Any]) -> None:
    """Also write ``state`` to the file that a launcher named, if any.

    It describes the start that this launcher made, while ``state.json`` may already describe a later one.
    """
    file = os.environ.get("PARTIALFC_STATE_FILE")
    if file:
        write_atomically(Path(file), _to_json(state))


def _to_json(state: dict[str, Any]) -> str:
    return json.dumps(state, indent=1) + "\n"
