"""The runs below a folder, and how they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from partialfc.errors import DataError
from partialfc.train.run_folder import read_state


def list_runs(folder: Path) -> Iterator[str]:
    """A line for each run: its folder, state and step. ``folder`` is a run folder, or one that holds run folders.

    Raises:
        DataError: there is none.
    """
    states = {path: state for path in (folder, *sorted(folder.glob("*"))) if (state := read_state(path)) is not None}
    if not states:
        raise DataError(f"{folder} is not a run folder and holds none")
    width = max(len(str(path)) for path in states)
    for path, state in states.items():
        yield f"{path!s:<{width}}  {state.get('state', '?'):<9}  step {state.get('step')}/{state.get('total_steps')}"
