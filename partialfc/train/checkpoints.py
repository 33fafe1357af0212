"""A run's checkpoints: written as it trains, and gone on from when it starts again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from partialfc import __version__
from partialfc.config import Config, parse_config
from partialfc.data.dataset import TarDataset
from partialfc.data.order import samples_before, steps_per_epoch
from partialfc.errors import ConfigError
from partialfc.tracking.progress import log
from partialfc.train.agreement import on_first
from partialfc.train.backbone import start_pretrained
from partialfc.train.checkpoint import TrainingState, newest_whole
from partialfc.train.checkpoint_files import prune
from partialfc.train.class_table import CLASSES, check_class_table
from partialfc.train.config_changes import Change, config_changes
from partialfc.train.growing import start_at_mean_embeddings
from partialfc.train.ranks import Rank
from partialfc.train.run_folder import RunFolder
from partialfc.train.saving import Saver


class Checkpoints:
    """Every rank has one. ``force`` goes on although the config has changed in ways that change results."""

    def __init__(
        self, config: Config, rank: Rank, dataset: TarDataset, state: TrainingState, force: bool = False
    ) -> None:
        self.config, self.rank, self.dataset, self.state, self.force = config, rank, dataset, state, force
        self.folder = config.run.dir / "checkpoints"
        keep = config.checkpoint
        self._saver = Saver(keep.asynchronous, lambda: prune(self.folder, keep.keep_last, keep.keep_every))
        self._other_samples = 0  # seen in data sets that this one has replaced, over those of as many steps of this one
        self._newest_step = -1  # that was loaded, or is written or being written

    # --- going on -----------------------------------------------------------------------------------------------------

    def resume(self) -> tuple[int, int]:
        """Take the newest whole checkpoint of the run folder, if there is one, else ``model.pretrained``. A collective.

        Returns:
            The steps done, and the samples seen in them; (0, 0) where a run begins.
        Raises:
            ConfigError: it is of a config, data set or class table that this run cannot go on from; or the pretrained
                weights are not of this backbone.
        """
        found = None if self.config.checkpoint.resume == "never" else newest_whole(self.folder)
        if found is None:
            start_pretrained(self.config, self.state.backbone)
            return 0, 0
        path, manifest = found
        new_classes = self._check_classes(path, manifest)
        self._check_unchanged(path, manifest, new_classes)
        num_classes = self.state.load(path, grow=new_classes > 0)
        step: int = manifest["step"]
        self._newest_step = -1 if new_classes else step  # the checkpoint that is there lacks them
        if self.rank.is_first:
            log(f"going on from {path}, written on {manifest.get('world_size')} ranks")
            if self.config.model.pretrained is not None:
                log("model.pretrained is for a run that begins; this one has its own weights")
        if new_classes:
            self._start_new_classes(num_classes)
        samples: int = manifest["samples"]
        self._other_samples = samples - self._samples_before(step)
        return step, samples

    def _samples_before(self, step: int) -> int:
        return samples_before(step, self.dataset.num_samples, self.config.data.global_batch_size)

    def _start_new_classes(self, first: int) -> None:
        how = self.config.checkpoint.grow_init
        if self.rank.is_first:
            log(f"grown from {first:,} to {self.dataset.num_classes:,} classes; the new ones start at {how} weights")
        if how == "embedding":
            start_at_mean_embeddings(self.config, self.rank, self.dataset, self.state, first)

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
        return on_first(lambda: check_class_table(before, now, self.config.checkpoint.grow))

    def _check_unchanged(self, path: Path, manifest: dict[str, Any], new_classes: int) -> None:
        """Say what is different from the run that wrote the checkpoint; refuse what cannot be, or not without force."""
        changes = config_changes(_with_defaults(manifest.get("config", {})), self.config.model_dump(mode="json"))
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
        if changes and self.rank.is_first:
            log("changed since the checkpoint: " + "; ".join(map(str, changes)))

    # --- saving -------------------------------------------------------------------------------------------------------

    def save(self, step: int) -> None:
        """Begin to write a checkpoint; how it ends is told by :meth:`report`. A collective."""
        if step == self._newest_step:
            return
        self._newest_step = step
        epoch, batch = divmod(step, steps_per_epoch(self.dataset.num_samples, self.config.data.global_batch_size))
        manifest = {
            "step": step,
            "samples": self._other_samples + self._samples_before(step),
            "loader": {"epoch": epoch, "batch": batch},
            # All random numbers are functions of the seed and of step, class, sample or rank: nothing else to keep.
            "rng": {"seed": self.config.run.seed, "step": step},
            "num_classes": self.dataset.num_classes,
            "data_digest": self.dataset.digest,
            "world_size": self.rank.world_size,
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


def _with_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A stored config; a key that there was not yet when it was stored has its default."""
    try:
        return parse_config(tree).model_dump(mode="json")
    except ConfigError:  # of a version whose keys were others
        return tree
