"""A run's checkpoints: saving, resuming, rolling back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from partialfc import __version__
from partialfc.checkpoint.class_table import check_class_table
from partialfc.checkpoint.config_diff import BEFORE_KEY, Change, config_changes
from partialfc.checkpoint.folders import (
    latest_valid,
    prune,
    restore_replaced,
    set_aside,
    step_folder,
    step_folders,
    step_of,
)
from partialfc.checkpoint.grow import start_at_mean_embeddings
from partialfc.checkpoint.state import TrainingState
from partialfc.checkpoint.writer import Saver
from partialfc.config import Config
from partialfc.data.dataset import TarDataset
from partialfc.data.index import CLASSES
from partialfc.data.order import BatchOrder
from partialfc.data.plain import describe
from partialfc.errors import ConfigError, DamagedCheckpoint, Diverged
from partialfc.runs.folder import RunFolder
from partialfc.runtime.collectives import broadcast_from_rank0, run_on_rank0
from partialfc.runtime.process import ProcessContext
from partialfc.tracking.console import log


@dataclass(frozen=True)
class ResumePoint:
    """Step, samples and counts at which a run resumes."""

    step: int = 0
    samples: int = 0
    counts: dict[str, Any] = field(default_factory=dict)  # as given to :meth:`Checkpoints.save`


class Checkpoints:
    """Writes and resumes from the checkpoints of a run; every rank has one.

    Args:
        order: the batches of the run if it began today; :meth:`resume` sets the attribute to those that follow the
            checkpoint.
        evaluating: provides the backbone in evaluation mode, as an engine does.
        force: resume despite config changes that change results.
    """

    def __init__(
        self,
        config: Config,
        process: ProcessContext,
        dataset: TarDataset,
        order: BatchOrder,
        state: TrainingState,
        evaluating: Callable[[], AbstractContextManager[nn.Module]],
        force: bool = False,
    ) -> None:
        self.config, self.process, self.dataset, self.state, self.force = config, process, dataset, state, force
        self.order = order
        self._evaluating = evaluating
        self.folder = config.run.dir / "checkpoints"
        keep = config.checkpoint
        self._saver = Saver(keep.asynchronous, lambda: prune(self.folder, keep.keep_last, keep.keep_every))
        self._other_samples = 0  # samples seen in other data sets or batches, beyond those of this order
        self._newest_step = -1  # loaded, written or being written
        self._complete_step = -1  # loaded or written
        self._rolled_back = (-1, 0)  # step of the checkpoint, number of times

    # --- resuming -----------------------------------------------------------------------------------------------------

    def resume(self) -> ResumePoint:
        """Load the newest valid checkpoint of the run folder, if there is one. A collective.

        Raises:
            ConfigError: the config, data set or class table does not fit the checkpoint.
            DamagedCheckpoint: there are checkpoints, and none is valid.
        """
        run_on_rank0(lambda: restore_replaced(self.folder))
        if self.config.checkpoint.resume == "never":
            self._set_aside(-1)
            return ResumePoint()
        found = latest_valid(self.folder)
        if found is None:
            if broadcast_from_rank0(lambda: step_folders(self.folder)):
                raise DamagedCheckpoint(
                    f"all checkpoints in {self.folder} are damaged, and the run would start again at step 0; restore "
                    "one, choose another run.dir, or start anew with checkpoint.resume=never, which sets them aside"
                )
            return ResumePoint()
        path, manifest = found
        new_classes = self._count_new_classes(path, manifest)
        self._check_unchanged(path, manifest, new_classes)
        num_classes = self.state.load(path, grow=new_classes > 0)
        self._set_aside(step_of(path))
        step: int = manifest["step"]
        self._complete_step = step
        self._newest_step = -1 if new_classes else step  # this step's checkpoint lacks the new classes
        if self.process.is_first:
            log(f"resuming from step {step:,} ({path}, written on {manifest.get('world_size')} ranks)")
        if new_classes:
            self._start_new_classes(num_classes)
        samples: int = manifest["samples"]
        self.order = self._order_after(step, manifest)
        self._other_samples = samples - self.order.samples_before(step)
        return ResumePoint(step, samples, manifest.get("counts", {}))

    def roll_back(self, step: int, most: int) -> str | None:
        """Load the newest valid checkpoint into a run that continues at ``step``. A collective.

        Args:
            most: rollbacks allowed to one checkpoint.

        Returns:
            Its path, or None if there is none.

        Raises:
            Diverged: the loss kept jumping after that many.
        """
        self._saver.wait()
        found = latest_valid(self.folder)
        if found is None or found[1]["step"] > step:
            return None
        path, manifest = found
        last, times = self._rolled_back
        times = times + 1 if last == manifest["step"] else 1
        self._rolled_back = (manifest["step"], times)
        if times > most:
            raise Diverged(f"the loss kept jumping after rolling back to {path} {most} times; lower optim.lr")
        self.state.load(path)
        self.state.head.step.fill_(step)  # samples, negatives and learning rate are those of this step
        self.state.head.restart_step()
        return str(path)

    def describe_newest(self) -> str:
        """Describe the checkpoint from which a failing run would resume."""
        if self._complete_step < 0:
            return "there is no checkpoint yet"
        return f"the newest checkpoint, of step {self._complete_step:,}, is older"

    def _set_aside(self, after: int) -> None:
        for place in broadcast_from_rank0(lambda: set_aside(self.folder, after)):
            if self.process.is_first:
                log(f"set aside, since its steps will be repeated: {place}")

    def _order_after(self, step: int, manifest: dict[str, Any]) -> BatchOrder:
        """Return the batches that follow a checkpoint: the next one, or with other batches the rest of the epoch."""
        data, loader = manifest.get("config", {}).get("data", {}), manifest.get("loader", {})
        size = data.get("global_batch_size", self.order.batch_size)
        last_batch = data.get("last_batch", BEFORE_KEY["data.last_batch"])
        if (size, last_batch) == (self.order.batch_size, self.order.last_batch):
            return replace(self.order, first_step=loader.get("first_step", 0))
        order = self.order.continued(step, loader.get("epoch", 0), loader.get("batch", 0) * size)
        if self.process.is_first:
            epoch, batch = order.place(step)
            log(f"the batches have changed; resuming at epoch {epoch + batch / order.steps_per_epoch:.4g}")
        return order

    def _start_new_classes(self, first: int) -> None:
        how = self.config.checkpoint.grow_init
        if self.process.is_first:
            log(f"grown from {first:,} to {self.dataset.num_classes:,} classes; the new ones start at {how} weights")
        if how == "embedding":
            with self._evaluating() as backbone:
                start_at_mean_embeddings(self.config, self.process, self.dataset, backbone, self.state.head, first)

    def _count_new_classes(self, path: Path, manifest: dict[str, Any]) -> int:
        """Return the number of classes added since the checkpoint; refuse any other difference between the classes."""
        if CLASSES not in manifest["files"]:
            if manifest.get("num_classes") == self.dataset.num_classes:
                return 0
            raise ConfigError(
                f"{path} has {manifest.get('num_classes')} classes and no {CLASSES} to compare with the "
                f"{self.dataset.num_classes} classes of {self.dataset.folder}"
            )
        before, now = path / CLASSES, self.dataset.class_table
        return broadcast_from_rank0(lambda: check_class_table(before, now, self.config.checkpoint.grow))

    def _check_unchanged(self, path: Path, manifest: dict[str, Any], new_classes: int) -> None:
        """Log config changes since the checkpoint; raise ConfigError for impossible ones, and without ``force`` for
        risky ones.
        """
        changes = config_changes(manifest.get("config", {}), self.config.model_dump(mode="json"))
        # Earlier versions wrote no digest where the index has none.
        if manifest.get("data_digest") not in ("", self.dataset.digest) and not new_classes:
            change = Change("data.train", "another data set", describe(self.config.data.train), "needs --force")
            changes = [other for other in changes if other.key != "data.train"] + [change]
        impossible = [str(change) for change in changes if change.severity == "impossible"]
        forced = [str(change) for change in changes if change.severity == "needs --force"]
        if impossible or (forced and not self.force):
            advice = "choose another run.dir" + ("" if impossible else ", or pass --force to resume anyway")
            raise ConfigError(
                f"{path} was written with a different config:\n  " + "\n  ".join(impossible + forced) + f"\n{advice}"
            )
        if changes and self.process.is_first:
            log("changed since the checkpoint: " + "; ".join(map(str, changes)))

    # --- saving -------------------------------------------------------------------------------------------------------

    def save(self, step: int, counts: dict[str, Any] | None = None) -> None:
        """Start writing a checkpoint; :meth:`report` logs the outcome. A collective.

        Args:
            counts: JSON-serialisable values that :meth:`resume` returns.
        """
        if step == self._newest_step:
            return
        self._newest_step = step
        epoch, batch = self.order.place(step)
        manifest = {
            "step": step,
            "samples": self._other_samples + self.order.samples_before(step),
            "counts": counts or {},
            "loader": {"epoch": epoch, "batch": batch, "first_step": self.order.first_step},
            # Every random number is a function of the seed and of step, class, sample or rank: there is no other state.
            "rng": {"seed": self.config.run.seed, "step": step},
            "num_classes": self.dataset.num_classes,
            "data_digest": self.dataset.digest,
            "world_size": self.process.world_size,
            "config": self.config.model_dump(mode="json"),
            "partialfc": __version__,
        }
        table = self.dataset.class_table
        extra = (table,) if table.exists() else ()
        self._saver.save(step_folder(self.folder, step), self.state.tensors(), manifest, extra)

    def report(self, folder: RunFolder | None, wait: bool = False) -> None:
        """Log the outcomes of the saves that have finished.

        Args:
            wait: first wait for all saves, the last of which must succeed.

        Raises:
            CheckpointFailed: the last one failed, with ``wait``.
        """
        if wait:
            self._saver.wait()
        ended = self._saver.ended()
        for result in ended:
            step = step_of(result.folder)
            self._complete_step = step if result.error is None else self._complete_step
            if folder and result.error is None:
                folder.metrics.write("event", event="checkpoint", step=step, path=str(result.folder))
            elif folder and not (wait and result is ended[-1]):
                # One lost checkpoint must not end the run: the previous one is still there.
                log(f"WARNING: {result.error}; training continues without it")
                folder.metrics.write("event", event="checkpoint_failed", step=step, reason=str(result.error))
        if wait and ended and ended[-1].error is not None:
            raise ended[-1].error

    def wait(self, seconds: float) -> None:
        """Wait up to ``seconds`` for a checkpoint that is being written, before the process ends."""
        self._saver.wait(seconds)
