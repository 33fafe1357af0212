"""``partialfc runs sync``: send what a run has kept of W&B for later.

The lines are those of metrics.jsonl, and W&B's server says how many it has (:mod:`partialfc.tracking.wandb.client`).
W&B's own ``wandb sync`` would send each attempt's file in whole, also the rows that the server has, in whatever order.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from partialfc.config import WandbConfig
from partialfc.errors import ConfigError, DataError, PartialFCError
from partialfc.runs.lock import FolderLock
from partialfc.tracking.wandb.lock import alone
from partialfc.tracking.wandb.run import LOG, UNSENT, client_options, require_client
from partialfc.tracking.wandb.supervisor import Client


class SyncFailed(PartialFCError):
    """W&B has not taken a run."""


def sync(folder: Path) -> bool:
    """Send what W&B does not have yet of the run in ``folder``; whether there was anything.

    Raises:
        DataError: there is no run, or it has nothing of W&B.
        MissingDependency: the client is not installed.
        SyncFailed: the run is going on, or W&B has not taken it; what it has not taken can be sent again.
    """
    require_client()
    if not (folder / "config.yaml").exists() or not (folder / "metrics.jsonl").exists():
        raise DataError(f"there is no run in {folder}: a run folder has a config.yaml and a metrics.jsonl")
    if not (folder / "wandb").is_dir():
        raise DataError(f"{folder} has no wandb folder: it was trained with tracking.wandb.mode=disabled")
    _refuse_a_live_run(folder)
    with alone(folder, 0) as nobody_else:
        if not nobody_else:
            raise SyncFailed(f"{folder} is being sent by another process; sync it when that has ended")
        if not (folder / "wandb" / UNSENT).exists():
            return False
        _send(folder)
    return True


def _refuse_a_live_run(folder: Path) -> None:
    """W&B would take it for ended. Whether it is being followed is not the question: its follower may be gone."""
    try:
        FolderLock(folder, 0).release()
    except ConfigError as error:
        raise SyncFailed(f"{folder}: the run is going on; sync it when it has ended") from error


def _send(folder: Path) -> None:
    """Let a client of our own go online and send all; as long as it takes."""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))  # the rest need not be valid here
    settings = WandbConfig.model_validate(config.get("tracking", {}).get("wandb", {}))
    options = client_options(folder, settings)
    with (folder / "wandb" / LOG).open("a") as log:
        client = Client(folder.resolve(), options | {"mode": "online", "system_metrics": False}, log)
    try:
        for expected in ("started", "logged", "finished"):
            word, text = client.says(None)
            if word != expected:
                raise SyncFailed(f"W&B has not taken {folder}: {text}; more may be in {folder / 'wandb' / LOG}")
            if word == "started":
                client.tell_end()
    finally:
        client.kill()
