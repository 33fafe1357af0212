"""The training loop: a data-parallel backbone, and the classifier sharded beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from partialfc.config import Config, build_head, build_head_optimizer
from partialfc.data.dataset import TarDataset
from partialfc.data.loader import Batch, build_loader
from partialfc.data.order import steps_per_epoch
from partialfc.errors import ConfigError, PartialFCError, RankLost
from partialfc.head import HeadOutput
from partialfc.head.hashing import stream_key
from partialfc.tracking.progress import console_progress, log, no_progress
from partialfc.train.backbone import build_backbone, build_backbone_optimizer, replicate
from partialfc.train.checkpoint import TrainingState
from partialfc.train.checkpoints import Checkpoints
from partialfc.train.describe import describe_memory, describe_rate
from partialfc.train.evaluation import Evaluation
from partialfc.train.phase_clock import PhaseClock
from partialfc.train.ranks import Rank
from partialfc.train.run_folder import RunFolder, record_failure
from partialfc.train.schedule import lr_factor

_DRAWS = 6  # the purpose that tells this stream of random numbers from the others
_STATE_EVERY = 10.0  # seconds between updates of state.json, at least


class Diverged(PartialFCError, ArithmeticError):
    """The loss is no longer finite."""


class Trainer:
    """Trains what a config describes, as one of the ranks of a run.

    Raises:
        ConfigError, DataError: before anything is written.
    """

    def __init__(self, config: Config, rank: Rank, force: bool = False) -> None:
        self.config, self.rank = config, rank
        self.dataset = TarDataset(config.data.train, console_progress if rank.is_first else no_progress)
        self.evaluation = Evaluation(config, self.dataset.num_classes)
        self.steps_per_epoch = steps_per_epoch(self.dataset.num_samples, config.data.global_batch_size)
        self.total_steps = max(1, round(config.optim.epochs * self.steps_per_epoch))
        self.warmup_steps = min(round(config.optim.warmup * self.steps_per_epoch), self.total_steps)

        torch.manual_seed(config.run.seed)
        self.plain_backbone = build_backbone(config, rank)
        self.backbone = replicate(self.plain_backbone, config, rank)
        self.head = build_head(config, self.dataset.num_classes, self.steps_per_epoch, rank.device)

        self.optimizer = build_backbone_optimizer(config, self.plain_backbone, rank.device)
        self.head_optimizer = build_head_optimizer(config, self.head)
        self.clock = PhaseClock(rank.device, entered=lambda phase: rank.enter(self.step, phase))
        state = TrainingState(self.plain_backbone, self.head, self.optimizer, self.head_optimizer)
        self.checkpoints = Checkpoints(config, rank, self.dataset, state, force)
        self.step = 0
        self.samples = 0

    def train(self) -> dict[str, Any]:
        """Run to the end; returns the last evaluation. Every rank calls it."""
        self.step, self.samples = self.checkpoints.resume()
        if self.step > self.total_steps:
            raise ConfigError(
                f"the checkpoint is of step {self.step:,}, and optim.epochs={self.config.optim.epochs:g} ends the run "
                f"at step {self.total_steps:,}; raise it to train on"
            )
        folder = RunFolder(self.config, self.total_steps, self.step) if self.rank.is_first else None
        try:
            if folder:
                self._describe()
            results = self._loop(folder)
        except BaseException as error:
            explained = self.rank.explain(error) if isinstance(error, Exception) else error
            if isinstance(error, Exception) and not isinstance(explained, RankLost):
                self.checkpoints.let_end(self.config.run.timeout / 2)
            if folder:
                reason = str(explained) or type(explained).__name__
                folder.metrics.write("event", event="failed", step=self.step, reason=reason)
                folder.set_state("failed", self.step, reason)
            elif isinstance(explained, PartialFCError) and not isinstance(explained, RankLost):
                record_failure(self.config.run.dir, f"rank {self.rank.rank}: {explained}")
            raise explained from (None if explained is error else error)
        if folder:
            folder.set_state("finished", self.step)
            folder.close()
        return results

    def _loop(self, folder: RunFolder | None) -> dict[str, Any]:
        data = self.config.data
        loader = build_loader(
            self.dataset,
            global_batch_size=data.global_batch_size,
            image_size=data.image_size,
            channels=data.channels,
            augment=data.augment,
            seed=self.config.run.seed,
            rank=self.rank.rank,
            world_size=self.rank.world_size,
            workers=data.workers,
            start_step=self.step,
            total_steps=self.total_steps,
            micro_batches=self.config.optim.accumulation,
        )
        log_every, evaluate_every = self.config.tracking.log_every, self.config.evaluation.every
        means = Means()
        started = state_written = time.monotonic()
        start_step, start_samples = self.step, self.samples
        elsewhere = 0.0  # seconds of evaluations and checkpoints
        progress = console_progress if folder else no_progress
        with progress("training", self.total_steps - start_step) as advance:
            self.clock.mark("start")
            for batch in loader:
                self.clock.mark("data")
                out, grad_norm = self.train_step(batch)
                means.add(out, grad_norm)
                self.step += 1
                if self.step == start_step + 1:
                    self.rank.set_timeout(self.config.run.timeout)
                if self.step % log_every == 0 or self.step == self.total_steps:
                    line = self._metrics(means, out)
                    if folder:
                        folder.metrics.write("train", **line)
                    advance(0, note=f"loss {line['loss']:.3f}  cos {line['target_cosine']:.3f}  {_rate(line)}")
                    means = Means()
                advance(1)
                if folder and time.monotonic() - state_written > _STATE_EVERY:
                    folder.set_state("running", self.step)
                    state_written = time.monotonic()
                before = time.monotonic()
                if self._is_due(self.config.checkpoint.every):
                    self._save()
                if self._is_due(evaluate_every):
                    with self.rank.patience():
                        self._evaluate(folder)
                self.checkpoints.report(folder)
                elsewhere += time.monotonic() - before
                self.clock.mark("start")
        seconds = time.monotonic() - started - elsewhere
        self._save()
        with self.rank.patience():
            results = self._evaluate(folder)
            self.rank.enter(self.step, "save")
            self.checkpoints.report(folder, wait=True)
        if folder:
            rate = (self.samples - start_samples) / seconds
            folder.metrics.write(
                "event", event="finished", step=self.step, training_seconds=seconds, samples_per_s=rate
            )
        return results

    def _is_due(self, every: int) -> bool:
        """Whether what happens every so many steps happens now; at the end it happens anyway."""
        return bool(every) and self.step % every == 0 and self.step < self.total_steps

    def train_step(self, batch: Batch) -> tuple[HeadOutput, Tensor]:
        """One step on this rank's share of the global batch; returns the head's output and the backbone's grad norm."""
        factor = lr_factor(
            self.step, self.total_steps, self.warmup_steps, self.config.optim.schedule, self.config.optim.power
        )
        _set_lr(self.optimizer, self.config.optim.lr * factor)
        _set_lr(self.head_optimizer, self.config.optim.lr * factor)
        # What a backbone draws (dropout) is a function of the step too: a run that goes on draws the same.
        torch.manual_seed(stream_key(self.config.run.seed, _DRAWS, self.step, self.rank.rank) % 2**63)
        images = batch.images.to(self.rank.device, non_blocking=True)
        labels = batch.labels.to(self.rank.device, non_blocking=True)
        outputs = []
        parts = self.config.optim.accumulation
        for part, (some_images, some_labels) in enumerate(_micro_batches(images, labels, parts)):
            with self._gradients_stay_local(part < parts - 1):
                embeddings = self.backbone(some_images)
                self.clock.mark("forward")
                out = self.head(embeddings, some_labels)
                self.clock.mark("head")
                # Each micro-batch counts by its samples: together they are one large batch.
                share = out.num_samples / self._samples_of(batch.step)
                # embeddings.grad is world_size times this rank's part; averaging over ranks makes the exact gradient.
                (out.loss * share).backward()
                self.clock.mark("backward")
            outputs.append((out, share))
        grad_norm = self._clip()
        self.clock.mark("backward")
        self.optimizer.step()
        self.head_optimizer.step()
        self.optimizer.zero_grad()
        self.head_optimizer.zero_grad()
        self.clock.mark("update")
        return _together(outputs), grad_norm

    def _gradients_stay_local(self, local: bool) -> AbstractContextManager[None]:
        """Within it backward does not average the backbone's gradients over ranks, if ``local``."""
        if local and isinstance(self.backbone, DistributedDataParallel):
            return self.backbone.no_sync()
        return nullcontext()

    def _samples_of(self, step: int) -> int:
        """Samples of a step's global batch; an epoch's last one may be short."""
        size = self.config.data.global_batch_size
        return min(size, self.dataset.num_samples - step % self.steps_per_epoch * size)

    def _clip(self) -> Tensor:
        """Clip the backbone's gradient; the norm is the one before."""
        largest = self.config.optim.clip
        return nn.utils.clip_grad_norm_(self.plain_backbone.parameters(), math.inf if largest is None else largest)

    def _metrics(self, means: Means, out: HeadOutput) -> dict[str, Any]:
        """A train line, the same on every rank: means over the steps since the last one."""
        values = means.read()
        if not math.isfinite(values["loss"]):
            raise Diverged(
                f"the loss is {values['loss']} at step {self.step}; lower optim.lr or raise optim.warmup "
                f"(now {self.config.optim.lr:g} and {self.config.optim.warmup:g} epochs)"
            )
        active = torch.tensor(out.active_rows, device=self.rank.device)
        if self.rank.world_size > 1:
            dist.all_reduce(active)
        seconds = {phase: total / means.steps for phase, total in self.clock.read("start").items()}
        self.clock.mark("start")
        counted = int(values.pop("num_samples"))
        self.samples += counted
        return {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 4),
            "samples": self.samples,
            **values,
            "active_rows": int(active),
            "lr": self.optimizer.param_groups[0]["lr"],
            "skipped_steps": 0,
            "samples_per_s": counted / (means.steps * sum(seconds.values())),
            "seconds": seconds,
        }

    def _save(self) -> None:
        self.rank.enter(self.step, "save")
        with self.rank.patience():  # another rank may still write the checkpoint before
            self.checkpoints.save(self.step)

    def _evaluate(self, folder: RunFolder | None) -> dict[str, Any]:
        self.rank.enter(self.step, "evaluate")
        results = self.evaluation.run(self.plain_backbone, self.head, self.rank, self.step)
        if folder and results:
            folder.metrics.write("evaluation", step=self.step, results=results)
            for name, found in results.items():
                tar = "  ".join(f"TAR {value:.4f} at FAR {far}" for far, value in found.get("tar_at_far", {}).items())
                log(f"{name}: " + (tar or f"accuracy {found['accuracy']:.4f}"))
        return results

    def _describe(self) -> None:
        parameters = sum(parameter.numel() for parameter in self.plain_backbone.parameters())
        log(
            f"{self.dataset.num_samples:,} images of {self.dataset.num_classes:,} classes; {self.config.model.name} "
            f"({parameters / 1e6:.1f} M parameters); {self.head.loss.__class__.__name__}({self.head.loss.extra_repr()})"
        )
        where = f"{self.rank.world_size} ranks on {self.rank.device.type}"
        log(
            f"{self.total_steps:,} steps of {self.config.data.global_batch_size} images over {where}, "
            f"{len(self.head.weight):,} classes on rank 0, sample rate {describe_rate(self.head.sample_rate)}; "
            f"run folder {self.config.run.dir}"
        )
        log(describe_memory(self.config, self.head))


class Means:
    """Sums of what steps report, kept on the device until they are read."""

    def __init__(self) -> None:
        self.steps = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, out: HeadOutput, grad_norm: Tensor) -> None:
        """Add one step."""
        values = {
            "loss": out.loss.detach(),
            "softmax_loss": out.softmax_loss,
            "center_loss": out.center_loss,
            "target_cosine": out.target_cosine,
            "grad_norm": grad_norm,
            "num_samples": out.num_samples,
        }
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.double()
        self.steps += 1

    def read(self) -> dict[str, float]:
        """The mean of each over the steps, but the sum of ``num_samples``."""
        return {
            name: float(total) if name == "num_samples" else float(total) / self.steps
            for name, total in self._sums.items()
        }


def _micro_batches(images: Tensor, labels: Tensor, parts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The ``parts`` slices of a batch, all of one size; the loader has laid them out."""
    size = len(labels) // parts
    for part in range(parts):
        some = slice(part * size, (part + 1) * size)
        yield images[some], labels[some]


def _together(outputs: list[tuple[HeadOutput, Tensor]]) -> HeadOutput:
    """What the head would have said of all micro-batches as one, each with its share of the samples."""
    if len(outputs) == 1:
        return outputs[0][0]

    def mean(name: str) -> Tensor:
        return torch.stack([getattr(out, name).detach() * share for out, share in outputs]).sum(0)

    return HeadOutput(
        mean("loss"),
        mean("softmax_loss"),
        mean("center_loss"),
        mean("target_cosine"),
        torch.stack([out.num_samples for out, _ in outputs]).sum(0),
        max(out.active_rows for out, _ in outputs),
    )


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def _rate(line: dict[str, Any]) -> str:
    return f"{line['samples_per_s']:,.0f} images/s"
