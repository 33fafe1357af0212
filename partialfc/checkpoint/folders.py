"""Checkpoint folders on disk: listing, newest valid one, pruning, setting aside."""

from __future__ import annotations

import itertools
import os
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from partialfc.checkpoint.manifest import MANIFEST, check_file, read_manifest, verify
from partialfc.errors import CheckpointFailed, ConfigError, DamagedCheckpoint
from partialfc.runs.state import STATE
from partialfc.runtime.collectives import all_gather_object, broadcast_from_rank0, is_rank0, rank_slice
from partialfc.tracking.console import log

REPLACED = ".replaced"  # suffix of the hidden name of a checkpoint that is being replaced


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of ``step``."""
    return folder / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint folder's name."""
    return int(checkpoint.name.removeprefix("step-"))


def step_folders(folder: Path) -> list[Path]:
    """Return the checkpoint folders in ``folder``, newest first."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def config_of_run(run: Path) -> dict[str, Any] | None:
    """Return the config that the newest readable checkpoint of a run was written with, resolved; None if none."""
    for checkpoint in step_folders(run / "checkpoints"):
        with suppress(DamagedCheckpoint):
            config: dict[str, Any] = read_manifest(checkpoint).get("config", {})
            return config
    return None


def latest_valid(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint in ``folder`` whose files all match their digests, and its manifest; or None.

    Damaged checkpoints are logged and skipped. A collective: the ranks share the reading and agree on the result.
    """
    for checkpoint in broadcast_from_rank0(lambda: step_folders(folder)):
        try:
            manifest = broadcast_from_rank0(partial(read_manifest, checkpoint))
            files = manifest["files"]
            mine = [check_file(checkpoint, name, files[name]) for name in rank_slice(sorted(files))]
            problems = [problem for part in all_gather_object(mine) for problem in part if problem]
            if problems:
                raise DamagedCheckpoint(f"{checkpoint}: {'; '.join(problems)}")
            return checkpoint, manifest
        except DamagedCheckpoint as error:
            if is_rank0():
                log(f"skipping a damaged checkpoint: {error}")
    return None


def find_checkpoint(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return a valid checkpoint and its manifest: ``path`` itself, or the newest of a run folder.

    Raises:
        ConfigError: ``path`` is neither.
        DamagedCheckpoint: the checkpoint was modified, or all of the run are.
    """
    if is_checkpoint(path):
        return path, verify(path)
    require_run(path)
    found = latest_valid(path / "checkpoints")
    if found is None:
        raise DamagedCheckpoint(f"{path / 'checkpoints'} holds no valid checkpoint")
    return found


def is_checkpoint(path: Path) -> bool:
    """Return True if ``path`` is a checkpoint, complete or not, rather than the folder of a run."""
    return any(os.path.lexists(path / name) for name in (MANIFEST, ".metadata"))


def require_run(path: Path) -> None:
    """Require that ``path`` is the folder of a run with checkpoints.

    Raises:
        ConfigError: it is not; the message says what it is.
    """
    try:
        found = "" if step_folders(path / "checkpoints") else _describe(path)
    except OSError as error:
        found = f"cannot be read ({error.strerror})"
    if found:
        raise ConfigError(f"{path} {found}; expected the folder of a run with checkpoints")


def newest(path: Path) -> Path:
    """Return the newest checkpoint of a run folder, valid or not.

    Raises:
        ConfigError: ``path`` is not a run with checkpoints.
    """
    require_run(path)
    return step_folders(path / "checkpoints")[0]


def _describe(path: Path) -> str:
    """Describe a path that is not a run with checkpoints."""
    if not path.is_dir():
        return "is a file" if path.exists() else "does not exist"
    if is_checkpoint(path):
        return f"is a checkpoint of the run {path.resolve().parent.parent}"
    if step_folders(path):
        return f"holds the checkpoints of the run {path.resolve().parent}"
    if (path / STATE).exists() or (path / "checkpoints").is_dir():
        return "is a run without checkpoints"
    runs = sorted(other.parent for other in path.glob("*/checkpoints"))
    if runs:
        return f"holds {len(runs)} run{'s' if len(runs) > 1 else ''}, such as {runs[0]}"
    kinds = {"index.json": "a data set", "export.json": "an export"}
    return "is " + next((kind for name, kind in kinds.items() if (path / name).exists()), "some other folder")


def prune(folder: Path, keep_last: int, keep_every: int) -> list[Path]:
    """Remove old checkpoints, and return their paths.

    Args:
        keep_last: newest complete checkpoints to keep.
        keep_every: also keep checkpoints at multiples of this many steps; 0: none.
    """
    kept, removed = 0, []
    for path in step_folders(folder):
        milestone = keep_every and step_of(path) and step_of(path) % keep_every == 0
        if (path / MANIFEST).exists() and kept < keep_last:
            kept += 1
        elif kept >= keep_last and not milestone:
            # Rename first: a half-removed folder must not look like a checkpoint.
            doomed = path.with_name(f".{path.name}.removed")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            removed.append(path)
    return removed


def restore_replaced(folder: Path) -> None:
    """Restore the name of a checkpoint whose replacement was interrupted by a kill."""
    for replaced in folder.glob(f".step-*{REPLACED}"):
        path = replaced.with_name(replaced.name[1 : -len(REPLACED)])
        if not path.exists():
            with suppress(OSError):  # a read-only folder; the other checkpoints are used
                replaced.rename(path)


def set_aside(folder: Path, after: int) -> list[Path]:
    """Rename the checkpoints of steps beyond ``after``, damaged or unwanted, and return their new paths.

    Their steps will be repeated, and the new checkpoints must count as the newest. Nothing is removed.

    Raises:
        CheckpointFailed: one cannot be renamed.
    """
    places = []
    for path in step_folders(folder):
        if step_of(path) > after:
            names = (path.with_name(f"aside-{number}-{path.name}") for number in itertools.count(1))
            place = next(name for name in names if not name.exists())
            try:
                path.rename(place)
            except OSError as error:
                raise CheckpointFailed(f"{path} cannot be set aside: {error.strerror}; rename it yourself") from error
            places.append(place)
    return places
