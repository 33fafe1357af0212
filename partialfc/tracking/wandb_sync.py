"""``partialfc runs sync``: send what a run has kept of W&B for later."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from partialfc.errors import DataError, PartialFCError
from partialfc.tracking.wandb_run import UNFINISHED, require_client

_SYNCED = ".synced"  # W&B's own mark: beside the file of a run, all of which has been sent


class SyncFailed(PartialFCError):
    """W&B has not taken a run."""


def unsent(folder: Path) -> list[Path]:
    """The folders of W&B in a run folder that have not been sent in whole, oldest first.

    An online run counts until its server has everything: the last of it may be in the file only.
    """
    found = []
    for path in sorted(folder.glob("wandb/*run-*/run-*.wandb"), key=lambda path: _started(path.parent)):
        if path.with_name(path.name + _SYNCED).exists():
            continue
        if path.parent.name.startswith("offline-") or (path.parent / UNFINISHED).exists():
            found.append(path.parent)
    return found


def sync(folder: Path) -> int:
    """Send what W&B does not have yet of the run in ``folder``, attempt by attempt; how many attempts that were.

    Raises:
        DataError: the folder has nothing of W&B.
        MissingDependency: the client is not installed.
        SyncFailed: W&B has not taken it; what it has not taken can be sent again.
    """
    require_client()
    if not (folder / "wandb").is_dir():
        raise DataError(f"{folder} has no wandb folder: it was trained with tracking.wandb.mode=disabled")
    attempts = unsent(folder)
    for attempt in attempts:
        _send(attempt)
        (attempt / UNFINISHED).unlink(missing_ok=True)
    return len(attempts)


def _send(attempt: Path) -> None:
    """Let W&B's own command send one folder. The order matters: rows of one run must not go back."""
    environment = {"WANDB_ERROR_REPORTING": "false", **os.environ, "WANDB_DIR": str(attempt.parent.parent.resolve())}
    with tempfile.TemporaryFile("w+") as output:
        code = subprocess.call(
            [sys.executable, "-P", "-m", "wandb", "sync", "--include-online", str(attempt.resolve())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        output.seek(0)
        said = output.read()
    if code or not list(attempt.glob(f"*.wandb{_SYNCED}")):
        reason = re.sub(r"\s+", " ", said).strip()[-500:]
        raise SyncFailed(f"W&B has not taken {attempt}: {reason or f'exit code {code}'}")


def _started(attempt: Path) -> str:
    """When an attempt began, as its folder says: ``offline-run-20250131_235959-<id>``."""
    return attempt.name.removeprefix("offline-").removeprefix("run-")
