"""The training loop: a data-parallel backbone, and the classifier sharded beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from partialfc.build.backbone import build_backbone
from partialfc.build.engine import build_engine
from partialfc.build.head import build_head
from partialfc.build.optimizers import build_head_optimizer
from partialfc.checkpoint.manager import Checkpoints
from partialfc.checkpoint.state import TrainingState
from partialfc.config import Config, require_num_classes
from partialfc.data.dataset import TarDataset
from partialfc.data.loader import Batch, build_loader
from partialfc.data.order import steps_per_epoch
from partialfc.engines.base import Engine
from partialfc.errors import ConfigError, Interrupted, PartialFCError, RankLost
from partialfc.evaluate.runner import Evaluation, describe_results
from partialfc.head import HeadOutput
from partialfc.head.random import RandomStream, stream_key
from partialfc.planning.describe import describe_memory, describe_rate
from partialfc.runs.folder import (
    GivenUp,
    RunFolder,
    count_restarts,
    finished_before,
    lock_folder,
    record_failure,
)
from partialfc.runs.lock import FolderLock
from partialfc.runtime.collectives import run_on_rank0
from partialfc.runtime.process import ProcessContext, automatic_restarts
from partialfc.tracking.console import console_progress, log, no_progress
from partialfc.train.loss_spikes import SpikeRule
from partialfc.train.metrics import Means
from partialfc.train.micro_batches import merge_outputs, micro_batches
from partialfc.train.phase_clock import PhaseClock
from partialfc.train.pretrained import start_pretrained
from partialfc.train.schedule import lr_factor
from partialfc.train.step_check import Diverged, StepCheck, StepDecision, StepFlags, find_faults

_MOST_ROLL_BACKS = 3  # to one checkpoint
_INTERRUPTED = "a second Ctrl-C has ended the run at once; start again to go on from its newest checkpoint"

Outcome = Literal["finished", "preempted"]


@dataclass(frozen=True)
class StepResult:
    """What a step gives: the head's output, the norm of the backbone's gradient [], and what the ranks say of it."""

    out: HeadOutput
    grad_norm: Tensor
    check: StepCheck
    verdict: StepDecision
    skipped: bool
    scale_fell: bool  # the loss scale was lowered, and could be


class Trainer:
    """Trains what a config describes, as one of the ranks of a run.

    Raises:
        ConfigError, DataError: before anything is written.
    """

    def __init__(self, config: Config, process: ProcessContext, force: bool = False) -> None:
        self.config, self.process, self.force = config, process, force
        self.dataset = TarDataset(config.data.train, console_progress if process.is_first else no_progress)
        require_num_classes(config, self.dataset.num_classes)
        self.evaluation = Evaluation(config, self.dataset.num_classes)
        self.steps_per_epoch = steps_per_epoch(self.dataset.num_samples, config.data.global_batch_size)
        self.total_steps = max(1, round(config.optim.epochs * self.steps_per_epoch))
        self.warmup_steps = min(round(config.optim.warmup * self.steps_per_epoch), self.total_steps)

        torch.manual_seed(config.run.seed)
        self.backbone = build_backbone(config, process)
        start_pretrained(config, self.backbone)
        self.engine: Engine = build_engine(self.backbone, config, process)
        # Numbers that are not finite are the step's verdict's business: every rank gets as far as that.
        self.head = build_head(config, self.dataset.num_classes, self.steps_per_epoch, process.device, "propagate")
        self.head_optimizer = build_head_optimizer(config, self.head)
        self.clock = PhaseClock(process.device, entered=lambda phase: process.enter(self.step, phase))
        state = TrainingState(self.engine.state, self.head, self.head_optimizer)
        self.checkpoints = Checkpoints(config, process, self.dataset, state, self.engine.evaluating, force)
        spike = config.optim.spike
        self.spikes = SpikeRule(spike.factor, spike.window) if spike else None
        self.step = self.samples = 0
        self.training_seconds = 0.0  # of this attempt, without evaluations and checkpoints
        self.skipped_steps = self.skipped_in_a_row = 0

    def train(self) -> Outcome:
        """Run to the end, or until asked to stop. Every rank calls it."""
        # Before anything in the folder is looked at: what is waited for may still write a checkpoint, or finish.
        lock, waited = self._lock_folder()
        if waited and run_on_rank0(lambda: finished_before(self.config, self.force)):
            if lock:
                lock.release()
            return "finished"
        resumed = self.checkpoints.resume()
        self.step, self.samples = resumed.step, resumed.samples
        self.skipped_steps = resumed.counts.get("skipped_steps", 0)
        self.engine.load_counts(resumed.counts.get("engine", {}))
        if self.spikes and "spikes" in resumed.counts:
            self.spikes.load(resumed.counts["spikes"])
        if self.step > self.total_steps:
            raise ConfigError(
                f"the checkpoint is of step {self.step:,}, and optim.epochs={self.config.optim.epochs:g} ends the run "
                f"at step {self.total_steps:,}; raise it to train on"
            )
        folder = self._open_folder(lock)
        if folder:
            self.process.on_progress.append(folder.touch)
        self.process.on_lost.append(lambda reason: self._record_failure(folder, reason))
        try:
            if folder:
                self._describe()
            outcome = self._run(folder)
        except BaseException as error:
            explained = error
            if isinstance(error, Exception):
                explained = self.process.explain(error)
            elif isinstance(error, KeyboardInterrupt):
                explained = Interrupted(_INTERRUPTED)
            if isinstance(error, Exception) and not isinstance(explained, RankLost):
                self.checkpoints.let_end(self.config.run.timeout / 2)
            # Of a rank that is lost every other one tells: it may be the first.
            if folder or isinstance(explained, PartialFCError):
                self._record_failure(folder, str(explained) or type(explained).__name__)
            raise explained from (None if explained is error else error)
        if folder:
            folder.close()
        return outcome

    def _lock_folder(self) -> tuple[FolderLock | None, bool]:
        """The first rank's, and whether it was waited for; where it cannot be had, all ranks fail. A collective."""
        taken: list[FolderLock] = []

        def take() -> bool:
            taken.append(lock_folder(self.config))
            return taken[0].waited

        waited = run_on_rank0(take)
        return (taken[0] if taken else None), waited

    def _open_folder(self, lock: FolderLock | None) -> RunFolder | None:
        """The first rank's; where it cannot be had, or the run has been given up, all ranks fail. A collective."""
        opened: list[RunFolder] = []

        def open_it() -> None:
            try:
                restarts = count_restarts(self.config, self.step, automatic_restarts())
            except GivenUp as error:
                record_failure(self.config.run.dir, str(error), states=("running", "failed", "preempted"))
                raise
            opened.append(RunFolder(self.config, self.total_steps, self.step, restarts, lock))

        run_on_rank0(open_it)
        return opened[0] if opened else None

    def _record_failure(self, folder: RunFolder | None, reason: str) -> None:
        if folder:
            folder.metrics.write("event", event="failed", step=self.step, reason=reason)
            folder.set_state("failed", self.step, reason)
        else:
            record_failure(self.config.run.dir, f"rank {self.process.rank}: {reason}")

    def _run(self, folder: RunFolder | None) -> Outcome:
        start_samples = self.samples
        stopped = self._make_up_for_evaluation(folder) or self._train_steps(folder)
        self._save()
        stopped = stopped or self._evaluate(folder) is None
        self.process.enter(self.step, "save")
        with self.process.relaxed_timeout():
            self.checkpoints.report(folder, wait=True)
            if stopped:
                reason = self.process.why_stop()
                self.process.stop.request(reason)  # whoever was asked: what more comes is the same request
        self.process.stop.done()
        if folder and stopped:
            log(f"stopped after step {self.step:,} as asked by {reason}, with a checkpoint; start again to go on")
            folder.metrics.write("event", event="preempted", step=self.step, reason=reason)
            folder.set_state("preempted", self.step, f"asked to stop by {reason}")
        elif folder:
            seconds = self.training_seconds
            rate = (self.samples - start_samples) / seconds if seconds else 0.0
            folder.metrics.write(
                "event", event="finished", step=self.step, training_seconds=seconds, samples_per_s=rate
            )
            folder.set_state("finished", self.step)
        return "preempted" if stopped else "finished"

    def _train_steps(self, folder: RunFolder | None) -> bool:
        """Train to the last step, or until asked to stop: whether that was so."""
        log_every = self.config.tracking.log_every
        start_step, means, verdict = self.step, Means(), None
        before = time.monotonic()
        progress = console_progress if folder else no_progress
        with progress("training", self.total_steps - start_step) as advance:
            self.clock.mark("start")
            for batch in self._loader():
                self.clock.mark("data")
                result = self.train_step(batch)
                verdict = result.verdict
                means.add(result.out, result.grad_norm, result.skipped)
                self.step += 1
                self._follow_verdict(folder, result, batch)
                if self.step == start_step + 1:
                    self.process.set_timeout(self.config.run.timeout)
                if self.step % log_every == 0 or self.step == self.total_steps or verdict.stop:
                    line = self._metrics(means, result.out)
                    if folder:
                        folder.metrics.write("train", **line)
                    advance(0, note=f"loss {line['loss']:.3f}  cos {line['target_cosine']:.3f}  {_rate(line)}")
                    means = Means()
                advance(1)
                self.training_seconds += time.monotonic() - before
                if folder:
                    seconds = self.training_seconds / (self.step - start_step)
                    folder.progress(self.step, (self.total_steps - self.step) * seconds)
                if verdict.stop:
                    return True
                if self._is_due(self.config.checkpoint.every):
                    self._save()
                if self._is_due(self.config.evaluation.every) and self._evaluate(folder) is None:
                    return True
                self.checkpoints.report(folder)
                before = time.monotonic()
                self.clock.mark("start")
        return False

    def _loader(self) -> Iterator[Batch]:
        data = self.config.data
        return iter(
            build_loader(
                self.dataset,
                global_batch_size=data.global_batch_size,
                image_size=data.image_size,
                channels=data.channels,
                augment=data.augment,
                seed=self.config.run.seed,
                rank=self.process.rank,
                world_size=self.process.world_size,
                workers=data.workers,
                start_step=self.step,
                total_steps=self.total_steps,
                micro_batches=self.config.optim.accumulation,
            )
        )

    def _is_due(self, every: int) -> bool:
        """Whether what happens every so many steps happens now; at the end it happens anyway."""
        return bool(every) and self.step % every == 0 and self.step < self.total_steps

    # --- a step -------------------------------------------------------------------------------------------------------

    def train_step(self, batch: Batch) -> StepResult:
        """One step on this rank's share of the global batch: applied on all ranks, or skipped on all."""
        parts, lr = self.config.optim.accumulation, self._lr(self.step)
        self.engine.begin_step(lr)
        _set_lr(self.head_optimizer, lr)
        # What a backbone draws (dropout) is a function of the step too: a run that goes on draws the same.
        torch.manual_seed(stream_key(self.config.run.seed, RandomStream.BACKBONE, self.step, self.process.rank) % 2**63)
        images = batch.images.to(self.process.device, non_blocking=True)
        labels = batch.labels.to(self.process.device, non_blocking=True)
        check, outputs = StepCheck(self.process.device), []
        for part, (some_images, some_labels) in enumerate(micro_batches(images, labels, parts)):
            embeddings = self.engine.forward(some_images)
            self.clock.mark("forward")
            head_input = embeddings.detach().requires_grad_()
            out = self.head(head_input, some_labels)
            # Each micro-batch counts by its samples: together they are one large batch.
            share = out.num_samples / self._samples_of(batch.step)
            (out.loss * share).backward()
            self.clock.mark("head")
            # head_input.grad is world_size times this rank's part; averaging over ranks makes the exact gradient.
            assert head_input.grad is not None
            self.engine.backward(embeddings, head_input.grad, last=part == parts - 1)
            self.clock.mark("backward")
            check.embeddings(head_input)
            check.loss(out.loss)
            outputs.append((out, share))
        out = merge_outputs(outputs)
        check.gradients(*self.engine.finish_backward(), self.head.gradient_is_finite())
        verdict = check.agree(self.process, self._words(out))
        self.clock.mark("backward")
        skipped = verdict.broken or verdict.spike
        scale_fell = self.engine.skip() if skipped else False
        if not skipped and self.engine.step():
            self.head_optimizer.step()
        elif not skipped:  # the engine alone has seen an overflow, on all ranks
            skipped, scale_fell = True, self.engine.skip()
        self.head_optimizer.zero_grad()
        self.clock.mark("update")
        return StepResult(out, self.engine.grad_norm(), check, verdict, skipped, scale_fell)

    def _lr(self, step: int) -> float:
        optim = self.config.optim
        return optim.lr * lr_factor(step, self.total_steps, self.warmup_steps, optim.schedule, optim.power)

    def _words(self, out: HeadOutput) -> StepFlags:
        """What this rank has to say besides what it has seen in its tensors."""
        words = StepFlags.STOP if self.process.stop.requested else StepFlags(0)
        if self.spikes and self.process.is_first and self.spikes.is_spike(float(out.loss.detach())):
            words |= StepFlags.SPIKE
        return words

    def _samples_of(self, step: int) -> int:
        """Samples of a step's global batch; an epoch's last one may be short."""
        size = self.config.data.global_batch_size
        return min(size, self.dataset.num_samples - step % self.steps_per_epoch * size)

    def _follow_verdict(self, folder: RunFolder | None, result: StepResult, batch: Batch) -> None:
        """Count a skipped step and say why; give up after too many in a row. Go back after a spike."""
        if not result.skipped:
            self.skipped_in_a_row = 0
            return
        self.skipped_steps += 1
        if result.verdict.spike and not result.verdict.broken:
            self._follow_spike(folder, result)
            return
        self.skipped_in_a_row += not result.scale_fell  # while it falls, skipping is how a loss scale is found
        faults = find_faults(result.verdict, result.check, batch.indices, self.dataset, self.head, self.process)
        words = "; ".join(map(str, faults))
        if folder:
            log(f"WARNING: step {self.step:,} is skipped on all ranks: {words}")
            folder.metrics.write(
                "event", event="skipped_step", step=self.step, faults=[asdict(fault) for fault in faults]
            )
        if self.skipped_in_a_row >= self.config.run.skipped_in_a_row:
            raise Diverged(
                f"{self.skipped_in_a_row} steps in a row were skipped, the last for {words}; "
                f"{self.checkpoints.newest_in_words()}. Look at these samples; lower optim.lr or raise optim.warmup "
                f"(now {self.config.optim.lr:g} and {self.config.optim.warmup:g} epochs)"
            )

    def _follow_spike(self, folder: RunFolder | None, result: StepResult) -> None:
        """The state of the last checkpoint, with the samples that come next; no longer if that has not helped so far.
        A collective.
        """
        self.skipped_in_a_row += 1
        loss = float(result.out.loss.detach())
        with self.process.relaxed_timeout():
            checkpoint = self.checkpoints.roll_back(self.step, _MOST_ROLL_BACKS)
        if folder:
            where = f"back to {checkpoint}" if checkpoint else "skipped; there is no checkpoint to go back to"
            log(f"WARNING: the loss has jumped to {loss:.4g} at step {self.step:,}: {where}")
            folder.metrics.write("event", event="spike", step=self.step, loss=loss, rolled_back_to=checkpoint)
        if self.skipped_in_a_row >= self.config.run.skipped_in_a_row:
            raise Diverged(
                f"{self.skipped_in_a_row} steps in a row were skipped, the last for a jump of the loss to {loss:.4g}; "
                f"{self.checkpoints.newest_in_words()}. Lower optim.lr, or raise optim.spike.factor"
            )

    # --- what is written ----------------------------------------------------------------------------------------------

    def _metrics(self, means: Means, out: HeadOutput) -> dict[str, Any]:
        """A train line, the same on every rank: means over the steps since the last one."""
        values = means.read()
        active = torch.tensor(out.active_rows, device=self.process.device)
        if self.process.world_size > 1:
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
            "lr": self._lr(self.step - 1),
            "skipped_steps": self.skipped_steps,
            "samples_per_s": counted / (means.steps * sum(seconds.values())),
            "seconds": seconds,
        }

    def _save(self) -> None:
        self.process.enter(self.step, "save")
        counts: dict[str, Any] = {"skipped_steps": self.skipped_steps, "engine": self.engine.counts()}
        if self.spikes:
            counts["spikes"] = self.spikes.state()
        with self.process.relaxed_timeout():  # another rank may still write the checkpoint before
            self.checkpoints.save(self.step, counts)

    def _evaluate(self, folder: RunFolder | None) -> dict[str, Any] | None:
        """The results, or None if a request to stop came in between. A collective."""
        self.process.enter(self.step, "evaluate")
        with self.process.relaxed_timeout(), self.engine.evaluating() as backbone:
            results = self.evaluation.run(backbone, self.head, self.process, f"step-{self.step:08d}")
        if folder and results:
            folder.metrics.write("evaluation", step=self.step, results=results)
            for line in describe_results(results):
                log(line)
        return results

    def _make_up_for_evaluation(self, folder: RunFolder | None) -> bool:
        """Do the evaluation of the step that a run goes on from, if it ended before that; whether asked to stop."""
        if self.step == 0 or not self._is_due(self.config.evaluation.every):
            return False
        missing = run_on_rank0(lambda: folder is not None and not folder.has_evaluation(self.step))
        return missing and self._evaluate(folder) is None

    def _describe(self) -> None:
        parameters = sum(shape.numel() for shape in self.engine.state.shapes().values())
        log(
            f"{self.dataset.num_samples:,} images of {self.dataset.num_classes:,} classes; {self.config.model.name} "
            f"({parameters / 1e6:.1f} M parameters); {self.head.loss.__class__.__name__}({self.head.loss.extra_repr()})"
        )
        where = f"{self.process.world_size} ranks on {self.process.device.type}"
        log(
            f"{self.total_steps:,} steps of {self.config.data.global_batch_size} images over {where}, "
            f"{len(self.head.weight):,} classes on rank 0, sample rate {describe_rate(self.head.sample_rate)}; "
            f"run folder {self.config.run.dir}"
        )
        log(describe_memory(self.config, self.head))


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def _rate(line: dict[str, Any]) -> str:
    return f"{line['samples_per_s']:,.0f} images/s"
