"""A run's checkpoints: written as it trains, and gone on from when it starts again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from partialfc import __version__
from partialfc.checkpoint.class_table import CLASSES, check_class_table
from partialfc.checkpoint.config_diff import Change, config_changes
from partialfc.checkpoint.folders import DamagedCheckpoint, prune, set_aside, step_folders, undo_half_a_replacement
from partialfc.checkpoint.grow import start_at_mean_embeddings
from partialfc.checkpoint.state import TrainingState, latest_valid
from partialfc.checkpoint.writer import Saver
from partialfc.config import Config
from partialfc.data.dataset import TarDataset
from partialfc.data.order import samples_before, steps_per_epoch
from partialfc.errors import ConfigError, Diverged
from partialfc.runs.folder import RunFolder
from partialfc.runtime.collectives import broadcast_from_rank0, run_on_rank0
from partialfc.runtime.process import ProcessContext
from partialfc.tracking.console import log


@dataclass(frozen=True)
class ResumePoint:
    """How far a run has come."""

    step: int = 0
    samples: int = 0
    counts: dict[str, Any] = field(default_factory=dict)  # what :meth:`Checkpoints.save` was given


class Checkpoints:
    """Every rank has one.

    Args:
        evaluating: gives the backbone to embed images with, as an engine does.
        force: go on although the config has changed in ways that change results.
    """

    def __init__(
        self,
        config: Config,
        process: ProcessContext,
        dataset: TarDataset,
        state: TrainingState,
        evaluating: Callable[[], AbstractContextManager[nn.Module]],
        force: bool = False,
    ) -> None:
        self.config, self.process, self.dataset, self.state, self.force = config, process, dataset, state, force
        self._evaluating = evaluating
        self.folder = config.run.dir / "checkpoints"
        keep = config.checkpoint
        self._saver = Saver(keep.asynchronous, lambda: prune(self.folder, keep.keep_last, keep.keep_every))
        self._other_samples = 0  # seen in data sets that this one has replaced, over those of as many steps of this one
        self._newest_step = -1  # that was loaded, or is written or being written
        self._whole_step = -1  # that was loaded, or has been written
        self._rolled_back = (-1, 0)  # the checkpoint's step, how often

    # --- going on -----------------------------------------------------------------------------------------------------

    def resume(self) -> ResumePoint:
        """Take the newest whole checkpoint of the run folder, if there is one. A collective.

        Raises:
            ConfigError: it is of a config, data set or class table that this run cannot go on from.
            DamagedCheckpoint: there are some, and none is whole.
        """
        run_on_rank0(lambda: undo_half_a_replacement(self.folder))
        if self.config.checkpoint.resume == "never":
            self._set_aside(-1)
            return ResumePoint()
        found = latest_valid(self.folder)
        if found is None:
            if broadcast_from_rank0(lambda: step_folders(self.folder)):
                raise DamagedCheckpoint(
                    f"none of the checkpoints in {self.folder} is whole, and the run would begin at step 0; bring back "
                    "a whole one, choose another run.dir, or begin anew with checkpoint.resume=never, all set aside"
                )
            return ResumePoint()
        path, manifest = found
        new_classes = self._check_classes(path, manifest)
        self._check_unchanged(path, manifest, new_classes)
        num_classes = self.state.load(path, grow=new_classes > 0)
        self._set_aside(int(path.name[5:]))
        step: int = manifest["step"]
        self._whole_step = step
        self._newest_step = -1 if new_classes else step  # the checkpoint that is there lacks them
        if self.process.is_first:
            log(f"going on from {path}, written on {manifest.get('world_size')} ranks")
        if new_classes:
            self._start_new_classes(num_classes)
        samples: int = manifest["samples"]
        self._other_samples = samples - self._samples_before(step)
        return ResumePoint(step, samples, manifest.get("counts", {}))

    def roll_back(self, step: int, most: int) -> str | None:
        """Take weights, optimizers and state from the newest whole checkpoint, for a run that goes on from ``step``, at
        most so often from the same one. A collective.

        Returns:
            Its path; None if there is none.
        Raises:
            Diverged: going back to it has not helped.
        """
        self._saver.wait()
        found = latest_valid(self.folder)
        if found is None or found[1]["step"] > step:
            return None
        path, manifest = found
        since, times = self._rolled_back
        self._rolled_back = (manifest["step"], times + 1 if since == manifest["step"] else 1)
        if self._rolled_back[1] > most:
            raise Diverged(f"the loss jumped again and again after going back to {path} {most} times; lower optim.lr")
        self.state.load(path)
        self.state.head.step.fill_(step)  # its samples, negatives and learning rate are not those of the checkpoint
        self.state.head.restart_step()
        return str(path)

    def newest_in_words(self) -> str:
        """Where a run that fails now can go on from."""
        if self._whole_step < 0:
            return "there is no checkpoint yet"
        return f"the newest checkpoint, of step {self._whole_step:,}, is from before"

    def _set_aside(self, after: int) -> None:
        for place in broadcast_from_rank0(lambda: set_aside(self.folder, after)):
            if self.process.is_first:
                log(f"set aside, since its steps are done again: {place}")

    def _samples_before(self, step: int) -> int:
        return samples_before(step, self.dataset.num_samples, self.config.data.global_batch_size)

    def _start_new_classes(self, first: int) -> None:
        how = self.config.checkpoint.grow_init
        if self.process.is_first:
            log(f"grown from {first:,} to {self.dataset.num_classes:,} classes; the new ones start at {how} weights")
        if how == "embedding":
            with self._evaluating() as backbone:
                start_at_mean_embeddings(self.config, self.process, self.dataset, backbone, self.state.head, first)

    def _check_classes(self, path: Path, manifest: dict[str, Any]) -> int:
        """How many classes are new since the checkpoint."""
        before, now = path / CLASSES, self.dataset.folder / CLASSES
        if manifest.get("data_digest") == self.dataset.digest:
            return 0
        if CLASSES not in manifest["files"]:
            if manifest.get("num_classes") == self.dataset.num_classes:
                return 0
            raise ConfigError(
                f"{path} has {manifest.get('num_classes')} classes and no {CLASSES} to compare with the "
                f"{self.dataset.num_classes} classes of {self.dataset.folder}"
            )
        return broadcast_from_rank0(lambda: check_class_table(before, now, self.config.checkpoint.grow))

    def _check_unchanged(self, path: Path, manifest: dict[str, Any], new_classes: int) -> None:
        """Say what is different from the run that wrote the checkpoint; refuse what cannot be, or not without force."""
        changes = config_changes(manifest.get("config", {}), self.config.model_dump(mode="json"))
        if manifest.get("data_digest") != self.dataset.digest and not new_classes:
            change = Change("data.train", "another data set", str(self.config.data.train), "needs --force")
            changes = [other for other in changes if other.key != "data.train"] + [change]
        impossible = [str(change) for change in changes if change.verdict == "impossible"]
        forced = [str(change) for change in changes if change.verdict == "needs --force"]
        if impossible or (forced and not self.force):
            advice = "choose another run.dir" + ("" if impossible else ", or pass --force to go on all the same")
            raise ConfigError(
                f"{path} was written with another config:\n  " + "\n  ".join(impossible + forced) + f"\n{advice}"
            )
        if changes and self.process.is_first:
            log("changed since the checkpoint: " + "; ".join(map(str, changes)))

    # --- saving -------------------------------------------------------------------------------------------------------

    def save(self, step: int, counts: dict[str, Any] | None = None) -> None:
        """Begin to write a checkpoint; how it ends is told by :meth:`report`. A collective.

        Args:
            counts: what else :meth:`resume` is to give back.
        """
        if step == self._newest_step:
            return
        self._newest_step = step
        epoch, batch = divmod(step, steps_per_epoch(self.dataset.num_samples, self.config.data.global_batch_size))
        manifest = {
            "step": step,
            "samples": self._other_samples + self._samples_before(step),
            "counts": counts or {},
            "loader": {"epoch": epoch, "batch": batch},
            # All random numbers are functions of the seed and of step, class, sample or rank: nothing else to keep.
            "rng": {"seed": self.config.run.seed, "step": step},
            "num_classes": self.dataset.num_classes,
            "data_digest": self.dataset.digest,
            "world_size": self.process.world_size,
            "config": self.config.model_dump(mode="json"),
            "partialfc": __version__,
        }
        table = self.dataset.folder / CLASSES
        path = self.folder / f"step-{step:08d}"
        self._saver.save(path, self.state.tensors(), manifest, (table,) if table.exists() else ())

    def report(self, folder: RunFolder | None, wait: bool = False) -> None:
        """Say how the saves that have ended went. With ``wait``, of all, and the last must have succeeded.

        Raises:
            CheckpointFailed: the last one failed, with ``wait``.
        """
        if wait:
            self._saver.wait()
        ended = self._saver.ended()
        for saved in ended:
            step = int(saved.folder.name[5:])
            self._whole_step = step if saved.error is None else self._whole_step
            if folder and saved.error is None:
                folder.metrics.write("event", event="checkpoint", step=step, path=str(saved.folder))
            elif folder and not (wait and saved is ended[-1]):
                # The run is worth more than one checkpoint of it, and the one before is still there.
                log(f"WARNING: {saved.error}; training goes on without it")
                folder.metrics.write("event", event="checkpoint_failed", step=step, reason=str(saved.error))
        if wait and ended and ended[-1].error is not None:
            raise ended[-1].error

    def let_end(self, seconds: float) -> None:
        """Give what is being written some time to become complete, in a process that is about to end."""
        self._saver.wait(seconds)
