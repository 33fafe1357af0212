"""The training loop: a data-parallel backbone, and the classifier sharded beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from partialfc.build.backbone import build_backbone, check_batches
from partialfc.build.engine import build_engine
from partialfc.build.head import build_head
from partialfc.build.optimizers import build_head_optimizer
from partialfc.checkpoint.manager import Checkpoints
from partialfc.checkpoint.state import TrainingState
from partialfc.config import Config, build_sample_rate, require_num_classes
from partialfc.data.class_table import require_class_table
from partialfc.data.dataset import TarDataset
from partialfc.data.loader import Batch, LoaderSettings, build_loader, require_samples, running
from partialfc.data.order import BatchOrder, local_share
from partialfc.engines.base import Engine
from partialfc.errors import ConfigError, Diverged, Interrupted, PartialFCError, RankLost
from partialfc.evaluate.runner import Evaluation
from partialfc.files import FileLock
from partialfc.head import HeadOutput
from partialfc.head.random import RandomStream, stream_key
from partialfc.runs.folder import RunFolder, lock_folder
from partialfc.runs.restarts import GivenUp, count_restarts
from partialfc.runs.state import record_failure
from partialfc.runtime.agreement import require_same
from partialfc.runtime.collectives import broadcast_from_rank0, run_alike, run_on_rank0
from partialfc.runtime.process import ProcessContext, automatic_restarts
from partialfc.runtime.stopping import StopCause, StoppedBy
from partialfc.tracking.console import Pace, console_progress, no_progress
from partialfc.train.agreement import backbone_facts, config_facts, data_facts
from partialfc.train.finished import finished_before
from partialfc.train.loss_spikes import SpikeRule
from partialfc.train.metrics import TrainMetrics
from partialfc.train.micro_batches import merge_outputs, micro_batches, padded
from partialfc.train.phase_clock import PhaseClock
from partialfc.train.pretrained import start_pretrained
from partialfc.train.refusal import refusing
from partialfc.train.run_log import RunLog
from partialfc.train.schedule import Schedule
from partialfc.train.slow_rank import own_phases
from partialfc.train.step_check import StepCheck, StepDecision, find_faults

_MOST_ROLL_BACKS = 3  # to one checkpoint
_INTERRUPTED = "a second Ctrl-C ended the run; start again to resume from its newest checkpoint"

Outcome = Literal["finished", "preempted"]


@dataclass(frozen=True)
class StepResult:
    """Outcome of a training step."""

    out: HeadOutput  # of the whole batch
    grad_norm: Tensor  # [], of the backbone
    check: StepCheck
    decision: StepDecision
    skipped: bool
    scale_fell: bool  # skipping has lowered the loss scale


class Trainer:
    """Trains the run that a config describes, as one of its ranks. A collective.

    Raises:
        ConfigError, DataError: before anything is written; on all ranks, if it is the data's.
    """

    def __init__(self, config: Config, process: ProcessContext, force: bool = False) -> None:
        self.config, self.process, self.force = config, process, force
        require_same(config_facts(config, force))  # another engine, or batch, would keep the ranks waiting
        require_same(run_alike(self._prepare))
        table, num_classes = self.dataset.class_table, self.dataset.num_classes
        run_on_rank0(lambda: require_class_table(table, num_classes))
        self.evaluation.match_classes(num_classes, table)
        order = self.schedule.order
        self.local_share = local_share(order.batch_size, config.optim.accumulation, process.world_size)
        start_pretrained(config, self.backbone)
        self.engine: Engine = build_engine(self.backbone, config, process)
        # "propagate": a rank with NaN or Inf gets as far as the check of the step, where all ranks agree to skip it.
        self.head = build_head(config, self.dataset.num_classes, order.steps_per_epoch, process.device, "propagate")
        self.head_optimizer = build_head_optimizer(config, self.head)
        state = TrainingState(self.engine.state, self.head, self.head_optimizer)
        self.checkpoints = Checkpoints(config, process, self.dataset, order, state, self.engine.evaluating, force)
        spike = config.optim.spike
        self.spike_rule = SpikeRule(spike.factor, spike.window) if spike else None

        self.clock = PhaseClock(process.device, on_enter=lambda phase: process.enter(self.step, phase))
        alone = own_phases(self.backbone, config.engine)
        self.metrics = TrainMetrics(process, self.schedule, self.clock, alone)
        self.log = RunLog(config, process, None)
        self.step = 0
        self.skipped_steps = self.skipped_in_a_row = 0
        self.training_seconds = 0.0  # of this attempt, without evaluations and checkpoints

    def _prepare(self) -> dict[str, str]:
        """Open the data and build the backbone, without the other ranks; return the facts in which all must agree."""
        config, process = self.config, self.process
        self.dataset = TarDataset(config.data.train, console_progress)  # shown by the rank that indexes, of each host
        require_samples(self.dataset)
        require_num_classes(config, self.dataset.num_classes)
        self.evaluation = Evaluation(config)
        self.schedule = Schedule(config, BatchOrder.from_config(config, self.dataset.num_samples))
        torch.manual_seed(config.run.seed)
        self.backbone = build_backbone(config, process)
        check_batches(config, self.backbone, self.schedule.order, process)
        if process.world_size == 1:
            return {}
        facts = data_facts("data.train", self.dataset) | backbone_facts(self.backbone, config.model.name)
        for number, found in enumerate(self.evaluation.sets):
            facts |= data_facts(f"evaluation.sets[{number}]", found.dataset)
        return facts

    # --- a run --------------------------------------------------------------------------------------------------------

    def train(self) -> Outcome:
        """Train to the last step, or until asked to stop. A collective.

        Raises:
            PartialFCError: the run failed; ``state.json`` has the reason.
        """
        # Before anything in the folder is read: a process that is waited for may still write a checkpoint, or finish.
        lock = run_on_rank0(lambda: lock_folder(self.config))
        if broadcast_from_rank0(lambda: bool(lock and lock.waited) and finished_before(self.config, self.force)):
            if lock:
                lock.release()
            return "finished"
        with refusing():
            self._resume()
        self.log = RunLog(self.config, self.process, run_on_rank0(lambda: self._open_folder(lock)))
        if self.log.folder:
            self.process.on_progress.append(self.log.folder.touch)
        self.process.on_lost.append(lambda reason: self.log.failed(self.step, reason))
        try:
            self.log.describe(self.dataset, self.engine, self.head, self.schedule.total_steps)
            outcome = self._run()
        except BaseException as error:
            explained = self._record_failure(error)
            raise explained from (None if explained is error else error)
        self.log.close()
        return outcome

    def _resume(self) -> None:
        """Continue from the newest checkpoint of the run folder, if there is one. A collective."""
        point = self.checkpoints.resume()
        self.step, self.metrics.samples = point.step, point.samples
        self.schedule.order = order = self.checkpoints.order
        self.head.sample_rate = build_sample_rate(self.config.head, order.steps_per_epoch, order.first_step)
        self.skipped_steps = point.counts.get("skipped_steps", 0)
        self.engine.load_counts(point.counts.get("engine", {}))
        if self.spike_rule and "spikes" in point.counts:
            self.spike_rule.load(point.counts["spikes"])
        if self.step > self.schedule.total_steps:
            raise ConfigError(
                f"the checkpoint is at step {self.step:,}, but optim.epochs={self.config.optim.epochs:g} ends the run "
                f"at step {self.schedule.total_steps:,}; raise optim.epochs to continue"
            )

    def _open_folder(self, lock: FileLock | None) -> RunFolder:
        """Open the run folder on rank 0, which holds its ``lock``."""
        try:
            restarts = count_restarts(self.config, self.step, automatic_restarts())
        except GivenUp as error:
            states = ("running", "failed", "preempted")
            record_failure(self.config.run.dir, str(error), states, given_up=True)
            raise
        heartbeat = self.process.timings.heartbeat
        seen = {"samples": self.metrics.samples, "skipped_steps": self.skipped_steps}
        folder = RunFolder(self.config, self.schedule.total_steps, self.step, restarts, lock, heartbeat, **seen)
        folder.on_lost = lambda reason: self.process.stop.request(StopCause(StoppedBy.PERSON, reason))
        return folder

    def _lost_folder(self) -> ConfigError | None:
        """Return the error of a run folder that is gone, by which any other one may be caused; rank 0 knows."""
        try:
            if self.log.folder:
                self.log.folder.require()
        except ConfigError as error:
            return error
        return None

    def _require_folder(self) -> None:
        """Raise ConfigError, on all ranks, if the run folder is no longer in its place. A collective."""
        lost = broadcast_from_rank0(self._lost_folder)
        if lost:
            raise lost

    def _record_failure(self, error: BaseException) -> BaseException:
        """Record the failure; return the error to raise, which names the rank at fault if that is known."""
        explained = error
        if isinstance(error, Exception):
            lost = self._lost_folder()
            explained = self.process.explain(lost or error)
            if not isinstance(explained, RankLost):
                self.checkpoints.wait(self.config.run.timeout / 2)
                if not lost:
                    self.checkpoints.report(self.log.folder)
        elif isinstance(error, KeyboardInterrupt):
            explained = Interrupted(_INTERRUPTED)
        # Every other rank reports a lost one: that may be rank 0.
        if self.log.folder or isinstance(explained, PartialFCError):
            self.log.failed(self.step, str(explained) or type(explained).__name__)
        return explained

    def _run(self) -> Outcome:
        first_samples = self.metrics.samples
        stopped = not self._make_up_for_evaluation() or self._train_steps()
        self._save()
        stopped = stopped or not self._evaluate()
        self.process.enter(self.step, "save")
        with self.process.relaxed_timeout():
            self.checkpoints.report(self.log.folder, wait=True)
            if stopped:
                cause = self.process.stop_cause()
                self.process.stop.request(cause)  # whichever rank was asked: a later signal is the same request
        self.process.stop.remove_file()
        if stopped:
            self.log.preempted(self.step, cause)
            return "preempted"
        self.log.finished(self.step, self.training_seconds, self.metrics.samples - first_samples)
        return "finished"

    def _train_steps(self) -> bool:
        """Train to the last step; return True if asked to stop by then."""
        first_step, total_steps = self.step, self.schedule.total_steps
        settings = LoaderSettings.from_config(self.config, self.process.rank, self.process.world_size)
        began, pace = time.monotonic(), Pace()
        progress = console_progress if self.process.is_first else no_progress
        loader = build_loader(self.dataset, settings, self.schedule.order, first_step, total_steps)
        with progress("training", total_steps, first_step, pace) as advance, running(loader) as batches:
            self.clock.start()
            for batch in batches:
                self.clock.end("data")
                result = self.train_step(batch)
                self.metrics.add(result.out, result.grad_norm, result.skipped)
                self.step += 1
                self._after_step(result, batch)
                stop = result.decision.stop
                if self.step == first_step + 1:
                    self.process.set_timeout(self.config.run.timeout)
                if self.step % self.config.tracking.log_every == 0 or self.step == total_steps or stop:
                    line = self.metrics.line(self.step, result.out.active_rows, self.skipped_steps)
                    self.log.train(line)
                    advance(0, note=f"loss {line['loss']:.3f}  cos {line['target_cosine']:.3f}  {_rate(line)}")
                seconds = time.monotonic() - began
                self.training_seconds += seconds
                pace.add(1, seconds)
                advance(1)
                self.log.progress(self.step, pace.seconds_for(total_steps - self.step))
                if stop:
                    return True
                if self._is_due(self.config.checkpoint.every):
                    self._save()
                if self._is_due(self.config.evaluation.every) and not self._evaluate():
                    return True
                self.checkpoints.report(self.log.folder)
                began = time.monotonic()
                self.clock.start()
        return False

    # --- a step -------------------------------------------------------------------------------------------------------

    def train_step(self, batch: Batch) -> StepResult:
        """Train on this rank's part of a global batch: all ranks apply the step, or all skip it."""
        lr = self.schedule.lr(self.step)
        self.engine.begin_step(lr)
        _set_lr(self.head_optimizer, lr)
        # The backbone's random numbers (dropout) are a function of the step: a resumed run draws the same.
        torch.manual_seed(stream_key(self.config.run.seed, RandomStream.BACKBONE, self.step, self.process.rank) % 2**63)
        parts, samples = len(batch.counts), sum(batch.counts_of_all_ranks)
        check, outputs = StepCheck(self.process.device), []
        for part, (images, labels, of_all_ranks) in enumerate(micro_batches(batch, self.process.device), start=1):
            last = part == parts
            embeddings = self.engine.forward(images, of_all_ranks, last)
            self.clock.end("forward")
            head_input = embeddings.detach().requires_grad_()
            out = self.head(*padded(head_input, labels, self.local_share))
            share = out.num_samples / samples  # weighted by it, micro-batches add up to the large batch
            (out.loss * share).backward()
            self.clock.end("head")
            # head_input.grad is world_size times this rank's part: averaging over ranks makes the exact gradient.
            assert head_input.grad is not None
            self.engine.backward(embeddings, head_input.grad, last)
            self.clock.end("backward")
            check.embeddings(head_input)
            check.loss(out.loss)
            outputs.append((out, share))
        out = merge_outputs(outputs)
        check.gradients(*self.engine.finish_backward(), self.head.gradient_is_finite())
        decision = check.agree(self.process, out.loss, self.spike_rule)
        self.clock.end("backward")
        skipped, scale_fell = self._apply_or_skip(decision)
        self.clock.end("update")
        return StepResult(out, self.engine.grad_norm(), check, decision, skipped, scale_fell)

    def _apply_or_skip(self, decision: StepDecision) -> tuple[bool, bool]:
        """Update backbone and head, or neither; return (skipped, the loss scale has fallen)."""
        # An engine may find an overflow that no check shows, on all ranks alike.
        applied = not (decision.nonfinite or decision.spike) and self.engine.step()
        if applied:
            self.head_optimizer.step()
        scale_fell = False if applied else self.engine.skip()
        self.head_optimizer.zero_grad()
        return not applied, scale_fell

    def _after_step(self, result: StepResult, batch: Batch) -> None:
        """Report a skipped step, roll back after a spike, and give up after too many skipped steps in a row.

        Raises:
            Diverged: on all ranks, when the run gives up.
        """
        if not result.skipped:
            self.skipped_in_a_row = 0
            return
        spike = result.decision.spike and not result.decision.nonfinite
        self.skipped_steps += 1
        self.skipped_in_a_row += spike or not result.scale_fell  # skipping is how a loss scale finds its value
        if spike:
            loss = result.decision.loss
            self.log.spike(self.step, loss, self._roll_back())
            reason, advice = f"a jump of the loss to {loss:.4g}", "Lower optim.lr, or raise optim.spike.factor"
        else:
            faults = find_faults(result.decision, result.check, batch.indices, self.dataset, self.head, self.process)
            self.log.skipped(self.step, faults)
            optim = self.config.optim
            reason = "; ".join(map(str, faults))
            advice = (
                "Look at these samples; lower optim.lr or raise optim.warmup "
                f"(now {optim.lr:g} and {optim.warmup:g} epochs)"
            )
        if self.skipped_in_a_row >= self.config.run.skipped_in_a_row:
            raise Diverged(
                f"{self.skipped_in_a_row} steps in a row were skipped, the last for {reason}; "
                f"{self.checkpoints.describe_newest()}. {advice}"
            )

    def _roll_back(self) -> str | None:
        """Load the newest checkpoint, and continue from there with the next samples; return its path. A collective."""
        with self.process.relaxed_timeout():
            return self.checkpoints.roll_back(self.step, _MOST_ROLL_BACKS)

    # --- between steps ------------------------------------------------------------------------------------------------

    def _is_due(self, every: int) -> bool:
        """Return True every ``every`` steps, except at the last step, which always saves and evaluates."""
        return bool(every) and self.step % every == 0 and self.step < self.schedule.total_steps

    def _save(self) -> None:
        """Start writing a checkpoint. A collective."""
        self.process.enter(self.step, "save")
        self._require_folder()
        counts: dict[str, Any] = {"skipped_steps": self.skipped_steps, "engine": self.engine.counts()}
        if self.spike_rule:
            counts["spikes"] = self.spike_rule.state()
        with self.process.relaxed_timeout():  # another rank may still write the previous checkpoint
            self.checkpoints.save(self.step, counts)

    def _evaluate(self) -> bool:
        """Evaluate the backbone; return False if asked to stop before the end. A collective."""
        self.process.enter(self.step, "evaluate")
        self._require_folder()
        with self.process.relaxed_timeout(), self.engine.evaluating() as backbone:
            results = self.evaluation.run(backbone, self.head, self.process, f"step-{self.step:08d}")
        if results:
            self.log.evaluation(self.step, results)
        return results is not None

    def _make_up_for_evaluation(self) -> bool:
        """Do the evaluation that the previous attempt missed; return False if asked to stop. A collective."""
        if self.step == 0 or not self._is_due(self.config.evaluation.every):
            return True
        folder = self.log.folder
        missing = broadcast_from_rank0(lambda: folder is not None and not folder.has_evaluation(self.step))
        return not missing or self._evaluate()


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def _rate(line: dict[str, Any]) -> str:
    return f"{line['samples_per_s']:,.0f} images/s"
