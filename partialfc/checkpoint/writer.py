"""Checkpoint writing, complete or absent: under a hidden name, synced to disk, then renamed."""

from __future__ import annotations

import json
import math
import shutil
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from partialfc.checkpoint.folders import REPLACED
from partialfc.checkpoint.host_copies import HostCopies
from partialfc.checkpoint.manifest import FORMAT, MANIFEST, describe_file, manifest_digest
from partialfc.errors import CheckpointFailed
from partialfc.files import sync_to_disk
from partialfc.runtime.collectives import Group, is_rank0, rank_slice, run_on_all_ranks
from partialfc.runtime.process import LONG_TIMEOUT


def save_checkpoint(
    folder: Path,
    tensors: dict[str, Tensor],
    manifest: dict[str, Any],
    extra: tuple[Path, ...] = (),
    group: Group = None,
) -> None:
    """Write a checkpoint folder. A collective.

    Args:
        folder: final name; a checkpoint already there is replaced.
        tensors: this rank's.
        manifest: fields of the manifest besides files, versions and digest; from rank 0.
        extra: files to copy into it; from rank 0.
        group: participating ranks; None: all.

    Raises:
        CheckpointFailed: on every rank: it cannot be written (a full disk), or a tensor holds NaN. No other checkpoint
            is touched.
    """
    first = is_rank0()
    temporary = folder.with_name(f".{folder.name}.incomplete")
    try:
        run_on_all_ranks(lambda: _check_finite(tensors), group)
        run_on_all_ranks(lambda: _begin(temporary, extra) if first else None, group)
        run_on_all_ranks(lambda: _write_tensors(temporary, tensors, group), group)
        # Rank 0's listing: on a network file system another rank may not see all files yet.
        names = run_on_all_ranks(lambda: sorted(path.name for path in temporary.iterdir()) if first else None, group)[0]
        files = run_on_all_ranks(lambda: {name: describe_file(temporary / name) for name in rank_slice(names)}, group)
        run_on_all_ranks(lambda: _finish(temporary, folder, manifest, files) if first else None, group)
    except CheckpointFailed:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)  # frees its space
        raise


def _check_finite(tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointFailed for NaN or Inf: no unusable checkpoint may replace a usable one."""
    for name, value in tensors.items():
        local = value.to_local() if isinstance(value, DTensor) else value
        if local.is_floating_point() and local.numel():
            largest = torch.linalg.vector_norm(local.detach(), math.inf)
            # A backbone's buffers may hold Inf on purpose, as masks do.
            if largest.isnan() or (largest.isinf() and not name.startswith("backbone.")):
                raise CheckpointFailed(f"{name} holds NaN or Inf")


def _begin(folder: Path, extra: tuple[Path, ...]) -> None:
    for leftover in folder.parent.glob(".step-*"):  # of a killed run: only one checkpoint is written at a time
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in extra:
        shutil.copyfile(path, folder / path.name)
        sync_to_disk(folder / path.name)


def _write_tensors(folder: Path, tensors: dict[str, Tensor], group: Group) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about saving in a single process, which is intended
        writer = dcp.FileSystemWriter(folder, sync_files=True)
        # Batch statistics differ between ranks; rank 0's are saved, since DDP broadcasts them.
        planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        alone = not dist.is_initialized()
        dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=alone)


def _finish(temporary: Path, folder: Path, manifest: dict[str, Any], files: list[dict[str, Any]]) -> None:
    """Write the manifest and rename the folder, which makes it a checkpoint.

    A kill between the two renames is repaired by :func:`partialfc.checkpoint.folders.restore_replaced`.
    """
    described = dict(sorted((name, file) for part in files for name, file in part.items()))
    for name, file in described.items():
        if (temporary / name).stat().st_size != file["bytes"]:
            raise CheckpointFailed(f"{name} does not have the {file['bytes']:,} bytes that its rank wrote")
    path = temporary / MANIFEST
    content = {"format": FORMAT, **manifest, "files": described, "torch": torch.__version__}
    path.write_text(json.dumps(content | {"digest": manifest_digest(content)}, indent=1), encoding="utf-8")
    sync_to_disk(path)
    sync_to_disk(temporary)
    replaced = folder.with_name(f".{folder.name}{REPLACED}")
    if folder.exists():  # of the same step, before the head grew
        folder.rename(replaced)
    temporary.rename(folder)
    sync_to_disk(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)  # last: it is slow, and a kill must leave one of the two


@dataclass(frozen=True)
class SaveResult:
    """Outcome of a save: the checkpoint is complete, or ``error`` says why not."""

    folder: Path
    error: CheckpointFailed | None


class Saver:
    """Saves while training continues, at most one checkpoint at a time.

    :meth:`save` copies the state into host buffers, which the next save reuses, and returns; a thread with its own
    process group writes the copy. Every rank has a saver and calls :meth:`save` at the same steps.

    Args:
        asynchronous: if false, :meth:`save` writes without a copy and returns when done.
        saved: called on rank 0, by the writing thread, after each complete checkpoint.
    """

    def __init__(self, asynchronous: bool, saved: Callable[[], object]) -> None:
        self.asynchronous, self._saved = asynchronous, saved
        self._group: Group = None
        if asynchronous and dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._ended: list[SaveResult] = []

    def save(
        self, folder: Path, tensors: dict[str, Tensor], manifest: dict[str, Any], extra: tuple[Path, ...] = ()
    ) -> None:
        """Save as :func:`save_checkpoint` does, once the previous save has ended; :meth:`ended` returns the outcome."""
        self.wait()
        if not self.asynchronous:
            self._write(folder, tensors, manifest, extra)
            return
        arguments = (folder, self._copied(tensors), manifest, extra)
        # A daemon: a lost rank would block this thread, and so the process's exit, for ever.
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until no checkpoint is being written, or for ``seconds``; return False if one still is."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def ended(self) -> list[SaveResult]:
        """Return the outcomes of the saves that ended since the last call, in order."""
        ended, self._ended = self._ended, []
        return ended

    def _write(
        self, folder: Path, tensors: dict[str, Tensor], manifest: dict[str, Any], extra: tuple[Path, ...]
    ) -> None:
        try:
            save_checkpoint(folder, tensors, manifest, extra, self._group)
            if is_rank0():
                self._saved()
            error = None
        except CheckpointFailed as failed:
            error = failed
        except Exception as failed:
            if not self.asynchronous:
                raise
            # Most likely another rank is lost: training will notice, and name it.
            error = CheckpointFailed(f"the checkpoint could not be written ({type(failed).__name__}: {failed})")
            error.__cause__ = failed
        self._ended.append(SaveResult(folder, error))

    def _copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return copies in host memory, in the previous save's where they fit."""
        local = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in tensors.items()}
        copies = self._copies.take(local)
        for device in {value.device for value in tensors.values() if value.device.type == "cuda"}:
            torch.cuda.synchronize(device)
        return {
            name: _like(value, copies[name]) if isinstance(value, DTensor) else copies[name]
            for name, value in tensors.items()
        }


def _like(value: DTensor, local: Tensor) -> DTensor:
    """Return ``local``, in host memory, as this rank's shard of a tensor like ``value``."""
    mesh = value.device_mesh if value.device_mesh.device_type == "cpu" else DeviceMesh("cpu", value.device_mesh.mesh)
    return DTensor.from_local(local, mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride())
