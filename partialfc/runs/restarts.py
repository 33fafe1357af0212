"""Limit on automatic restarts without progress."""

from __future__ import annotations

from typing import Any

from partialfc.config import Config
from partialfc.errors import PartialFCError
from partialfc.runs.state import read_state


class GivenUp(PartialFCError):
    """The run was restarted repeatedly without progress."""


def count_restarts(config: Config, step: int, automatic: int) -> int:
    """Return the number of automatic restarts in a row, this one included, that began at ``step``.

    Args:
        automatic: automatic restarts so far, as the launcher counts them; 0 if a person started the run.

    Raises:
        GivenUp: there are more than ``run.restarts_without_progress``, or the run was given up before.
    """
    previous = read_state(config.run.dir)
    if not automatic or previous is None or _integer(previous, "start_step", -1) < step:
        return 0
    reason = str(previous.get("reason") or "unknown; the process was killed")
    restarts = _integer(previous, "restarts", 0) + 1
    if restarts <= config.run.restarts_without_progress:
        return restarts
    if previous.get("given_up"):  # but the launcher restarted it
        raise GivenUp(reason)
    raise GivenUp(
        f"{restarts} restart{'s' if restarts != 1 else ''} in a row made no progress beyond step {step:,} "
        f"(last failure: {reason}); giving up. Start the run by hand to try again"
    )


def _integer(state: dict[str, Any], name: str, default: int) -> int:
    value = state.get(name)
    return value if isinstance(value, int) else default
