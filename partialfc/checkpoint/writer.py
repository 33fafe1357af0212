"""Writes checkpoints: complete or absent, on request while training goes on."""

from __future__ import annotations

import hashlib
import json
import math
import os
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

from partialfc.checkpoint.folders import FORMAT, MANIFEST, REPLACED, manifest_digest
from partialfc.errors import CheckpointFailed
from partialfc.runtime.collectives import Group, is_rank0, rank_slice, run_on_all_ranks
from partialfc.runtime.process import LONG_TIMEOUT


def save_checkpoint(
    folder: Path,
    tensors: dict[str, Tensor],
    manifest: dict[str, Any],
    extra: tuple[Path, ...] = (),
    group: Group = None,
) -> None:
    """Write ``folder``. A collective: every rank calls it. ``manifest`` and the ``extra`` files to copy into it are the
    first rank's.

    Raises:
        CheckpointFailed: on every rank, if it cannot be written (a full disk), or holds NaN; no other checkpoint is
            touched.
    """
    first = is_rank0()
    temporary = folder.with_name(f".{folder.name}.incomplete")
    try:
        run_on_all_ranks(lambda: _check_finite(tensors), group)
        run_on_all_ranks(lambda: _begin(temporary, extra) if first else None, group)
        run_on_all_ranks(lambda: _write_tensors(temporary, tensors, group), group)
        # The first rank's listing: on a network file system another's may still lack something.
        names = run_on_all_ranks(lambda: sorted(path.name for path in temporary.iterdir()) if first else None, group)[0]
        files = run_on_all_ranks(lambda: {name: _describe(temporary / name) for name in rank_slice(names)}, group)
        run_on_all_ranks(lambda: _finish(temporary, folder, manifest, files) if first else None, group)
    except CheckpointFailed:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)  # its room is needed
        raise


def _check_finite(tensors: dict[str, Tensor]) -> None:
    """A run must not replace checkpoints that it can go on from by one that it cannot."""
    for name, value in tensors.items():
        local = value.to_local() if isinstance(value, DTensor) else value
        if local.is_floating_point() and local.numel():
            largest = torch.linalg.vector_norm(local.detach(), math.inf)
            # A backbone's buffers may hold Inf on purpose (a mask).
            if largest.isnan() or (largest.isinf() and not name.startswith("backbone.")):
                raise CheckpointFailed(f"{name} holds NaN or Inf")


def _begin(folder: Path, extra: tuple[Path, ...]) -> None:
    for leftover in folder.parent.glob(".step-*"):  # of a run that was killed: only one is ever written at a time
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in extra:
        shutil.copyfile(path, folder / path.name)
        _sync(folder / path.name)


def _write_tensors(folder: Path, tensors: dict[str, Tensor], group: Group) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about saving in a single process, which is meant
        writer = dcp.FileSystemWriter(folder, sync_files=True)
        # Batch statistics differ between ranks, and the first one's are those that count: DDP hands them to the others.
        planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        alone = not dist.is_initialized()
        dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=alone)


def _describe(path: Path) -> dict[str, Any]:
    """Size and digest of a file that has been written, read back."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _finish(temporary: Path, folder: Path, manifest: dict[str, Any], files: list[dict[str, Any]]) -> None:
    """Write the manifest, and give the folder its name: only now it is a checkpoint.

    Of two renames a kill may come between: :func:`undo_half_a_replacement` is for that.
    """
    described = dict(sorted((name, file) for part in files for name, file in part.items()))
    for name, file in described.items():
        if (temporary / name).stat().st_size != file["bytes"]:
            raise CheckpointFailed(f"{name} is not what its rank has written: {file['bytes']:,} bytes")
    path = temporary / MANIFEST
    content = {"format": FORMAT, **manifest, "files": described, "torch": torch.__version__}
    path.write_text(json.dumps(content | {"digest": manifest_digest(content)}, indent=1), encoding="utf-8")
    _sync(path)
    _sync(temporary)
    replaced = folder.with_name(f".{folder.name}{REPLACED}")
    if folder.exists():  # of this step, before the head has grown
        folder.rename(replaced)
    temporary.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)  # only now: it takes long, and a kill must leave the one or the other


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Saved:
    """How the writing of a checkpoint has ended."""

    folder: Path
    error: CheckpointFailed | None


class Saver:
    """Saves while training goes on, at most one checkpoint at a time.

    :meth:`save` copies the state into host memory, which it keeps for the next time, and returns; a thread with a
    process group of its own writes the copy. Every rank makes one, and calls :meth:`save` in the same steps.

    Args:
        asynchronous: if false, :meth:`save` returns when the checkpoint is written, and there is no copy.
        saved: called on the first rank, by the thread that writes, when a checkpoint is complete.
    """

    def __init__(self, asynchronous: bool, saved: Callable[[], object]) -> None:
        self.asynchronous, self._saved = asynchronous, saved
        self._group: Group = None
        if asynchronous and dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._ended: list[Saved] = []

    def save(
        self, folder: Path, tensors: dict[str, Tensor], manifest: dict[str, Any], extra: tuple[Path, ...] = ()
    ) -> None:
        """Save as :func:`save_checkpoint` does; waits for the save before to end. :meth:`ended` tells of errors."""
        self.wait()
        if not self.asynchronous:
            self._write(folder, tensors, manifest, extra)
            return
        arguments = (folder, self._copied(tensors), manifest, extra)
        # A daemon: a rank that is lost would keep it, and with it this process, for ever.
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Return when nothing is being written any more, or after some ``seconds``."""
        if self._thread is not None:
            self._thread.join(seconds)
            if not self._thread.is_alive():
                self._thread = None

    def is_writing(self) -> bool:
        """Whether a save is going on."""
        return self._thread is not None and self._thread.is_alive()

    def ended(self) -> list[Saved]:
        """What has ended since the last call, in order."""
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
            # Most likely another rank is gone: training will notice, and say which.
            error = CheckpointFailed(f"the checkpoint could not be written ({type(failed).__name__}: {failed})")
            error.__cause__ = failed
        self._ended.append(Saved(folder, error))

    def _copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory, in the buffers of the last time where they fit."""
        for name, value in tensors.items():
            local = value.to_local() if isinstance(value, DTensor) else value
            copy = self._copies.get(name)
            if copy is None or copy.shape != local.shape or copy.dtype != local.dtype:
                copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.device.type == "cuda")
                self._copies[name] = copy
            copy.copy_(local.detach(), non_blocking=True)
        for device in {value.device for value in tensors.values() if value.device.type == "cuda"}:
            torch.cuda.synchronize(device)
        return {
            name: _like(value, self._copies[name]) if isinstance(value, DTensor) else self._copies[name]
            for name, value in tensors.items()
        }


def _like(value: DTensor, local: Tensor) -> DTensor:
    """``local``, in host memory, as this rank's part of a tensor such as ``value``."""
    mesh = value.device_mesh if value.device_mesh.device_type == "cpu" else DeviceMesh("cpu", value.device_mesh.mesh)
    return DTensor.from_local(local, mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride())
