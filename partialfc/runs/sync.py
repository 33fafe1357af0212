"""``partialfc runs sync``: send W&B the rows of a run that are missing there.

The rows are lines of ``metrics.jsonl``, and W&B's server reports how many it has
(:mod:`partialfc.tracking.wandb.client`). W&B's own ``wandb sync`` would send each attempt's file whole, including rows
that the server has, in any order.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from partialfc.config import WandbConfig, read_yaml
from partialfc.errors import DataError, PartialFCError
from partialfc.files import FileLock, open_append
from partialfc.runs.folder import LOCK
from partialfc.tracking.wandb.lock import client_lock
from partialfc.tracking.wandb.run import LOG, UNSENT, client_options, require_client, start_client


class SyncFailed(PartialFCError):
    """W&B did not accept a run."""


def sync(folder: Path) -> bool:
    """Send W&B the missing rows of the run in ``folder``, without a time limit; return False if none was missing.

    Raises:
        DataError: ``folder`` is not a run folder, or its run was not written for W&B.
        MissingDependency: W&B's client is not installed.
        SyncFailed: the run is training, or W&B did not accept all rows, which can be sent again.
    """
    require_client()
    if not (folder / "config.yaml").exists() or not (folder / "metrics.jsonl").exists():
        raise DataError(f"there is no run in {folder}: a run folder has a config.yaml and a metrics.jsonl")
    if not (folder / "wandb").is_dir():
        raise DataError(f"{folder} has no wandb folder: it was trained with tracking.wandb.mode=disabled")
    _refuse_live_run(folder)
    with client_lock(folder) as free:
        if not free:
            raise SyncFailed(f"{folder} is being sent by another process; sync it when that has ended")
    if not (folder / "wandb" / UNSENT).exists():
        return False
    _send(folder)
    return True


def _refuse_live_run(folder: Path) -> None:
    """Refuse a run that is still training, which W&B would mark as ended; its own client may have been killed."""
    lock = FileLock(folder / LOCK)
    try:
        if not lock.acquire():
            raise SyncFailed(f"{folder}: the run is still training; sync it when it has ended")
    finally:
        lock.release()


def _send(folder: Path) -> None:
    config = read_yaml(folder / "config.yaml")  # other sections need not be valid
    settings = WandbConfig.model_validate(config.get("tracking", {}).get("wandb", {}))
    options = client_options(folder, settings) | {"mode": "online", "limited": False, "system_metrics": False}
    with open_append(folder / "wandb" / LOG) as log:
        client = start_client(folder, options, subprocess.DEVNULL, log)
    said, _ = client.communicate()
    word, _, reason = said.strip().rpartition("\n")[2].partition(" ")
    if word != "finished":
        known = reason if word in ("failed", "unfinished") else "its client has died"
        raise SyncFailed(f"W&B did not accept {folder}: {known}; more may be in {folder / 'wandb' / LOG}")
