"""Starts in the folder of a finished run."""

from __future__ import annotations

from partialfc.checkpoint.config_diff import config_changes
from partialfc.config import Config, read_yaml
from partialfc.errors import ConfigError
from partialfc.runs.state import read_state


def finished_before(config: Config, force: bool = False) -> bool:
    """Return True if the run folder holds this run, finished.

    With ``force``, or when classes are added, a finished run of another config may be trained further.

    Raises:
        ConfigError: it holds a finished run of another config, which would be overwritten.
    """
    state = read_state(config.run.dir)
    if state is None or state.get("state") != "finished":
        return False
    try:
        before = read_yaml(config.run.dir / "config.yaml")
    except ConfigError:
        before = None
    if isinstance(before, dict) and not config_changes(before, config.model_dump(mode="json")):
        return True
    if not force and not config.checkpoint.grow:
        raise ConfigError(
            f"run.dir: {config.run.dir} holds a finished run of a different config; choose another run.dir, remove it, "
            "or pass --force to train it further"
        )
    return False
