"""Intervals between a run's signs of life, and the silence after which a rank counts as lost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timings:
    """Intervals and graces of a run, in seconds; the silence after which a rank is lost is ``run.timeout``."""

    sign_every: float = 1.0  # between a rank's signs of life
    heartbeat: float = 5.0  # between updates of state.json
    silent_after: float = 6.0  # without a new sign, once a collective has failed
    explain_within: float = 20.0  # to find the reason of a failed collective; the store may not answer
    grace_signs: int = 15  # a count of signs, within which the main thread may notice a failure on its own


DEFAULT_TIMINGS = Timings()
