"""Records of a run: files in its folder and lines on the console."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from partialfc.config import Config
from partialfc.data.dataset import TarDataset
from partialfc.engines.base import Engine
from partialfc.evaluate.runner import describe_results
from partialfc.head import PartialFC
from partialfc.planning.describe import describe_memory, describe_rate
from partialfc.runs.folder import RunFolder
from partialfc.runs.state import record_failure
from partialfc.runtime.process import ProcessContext
from partialfc.runtime.stopping import StopCause, StoppedBy
from partialfc.tracking.console import log
from partialfc.train.slow_rank import SlowRankRule
from partialfc.train.step_check import Fault


class RunLog:
    """The record of a run. On rank 0 it has the run folder; on other ranks, without one, it writes only failures."""

    def __init__(self, config: Config, process: ProcessContext, folder: RunFolder | None) -> None:
        self.folder = folder
        self._config, self._process = config, process
        self._slow_rank = SlowRankRule()

    def describe(self, dataset: TarDataset, engine: Engine, head: PartialFC, total_steps: int) -> None:
        """Print the sizes of the run."""
        if self.folder is None:
            return
        parameters = sum(shape.numel() for shape in engine.state.shapes().values())
        self._print(
            f"{dataset.num_samples:,} images of {dataset.num_classes:,} classes; {self._config.model.name} "
            f"({parameters / 1e6:.1f} M parameters); {head.loss.__class__.__name__}({head.loss.extra_repr()})"
        )
        where = f"{self._process.world_size} ranks on {self._process.device.type}"
        self._print(
            f"{total_steps:,} steps of {self._config.data.global_batch_size} images over {where}, "
            f"{len(head.weight):,} classes on rank 0, sample rate {describe_rate(head.sample_rate)}; "
            f"run folder {self._config.run.dir}"
        )
        self._print(describe_memory(self._config, head))

    def train(self, line: dict[str, Any]) -> None:
        """Write a train line; tell of a rank that has been slow for some lines."""
        self._write("train", **line)
        if self._slow_rank.is_slow(line):
            self._slow(line)

    def progress(self, step: int, seconds_left: float | None) -> None:
        """Record the completed step, for ``state.json``."""
        if self.folder:
            self.folder.progress(step, seconds_left)

    def skipped(self, step: int, faults: list[Fault]) -> None:
        """Record a skipped step and its faults."""
        self._print(f"WARNING: step {step:,} is skipped on all ranks: {'; '.join(map(str, faults))}")
        self._event("skipped_step", step, faults=[asdict(fault) for fault in faults])

    def spike(self, step: int, loss: float, checkpoint: str | None) -> None:
        """Record a spike of the loss, and the checkpoint to which the run was rolled back."""
        where = f"rolled back to {checkpoint}" if checkpoint else "skipped; there is no checkpoint to roll back to"
        self._print(f"WARNING: the loss jumped to {loss:.4g} at step {step:,}: {where}")
        self._event("spike", step, loss=loss, rolled_back_to=checkpoint)

    def evaluation(self, step: int, results: dict[str, Any]) -> None:
        """Record the results of an evaluation."""
        self._write("evaluation", step=step, results=results)
        for line in describe_results(results):
            self._print(line)

    def preempted(self, step: int, cause: StopCause) -> None:
        """Record the end of a run that was asked to stop."""
        why = cause.reason
        self._print(f"stopped after step {step:,} on request ({why}), checkpoint written; start again to resume")
        self._event("preempted", step, reason=why, stopped_by=cause.by)
        self._set_state("preempted", step, f"asked to stop by {why}", cause.by)

    def finished(self, step: int, training_seconds: float, samples: int) -> None:
        """Record the end of a run that is complete; seconds and samples are of this attempt."""
        rate = samples / training_seconds if training_seconds else 0.0
        self._event("finished", step, training_seconds=training_seconds, samples_per_s=rate)
        self._set_state("finished", step)

    def failed(self, step: int, reason: str) -> None:
        """Record the end of a run that failed."""
        self._event("failed", step, reason=reason)
        self._set_state("failed", step, reason)
        if self.folder is None:  # rank 0 may be ended before it can write anything
            record_failure(self._config.run.dir, f"rank {self._process.rank}: {reason}")

    def close(self) -> None:
        """Close the run folder."""
        if self.folder:
            self.folder.close()

    def _slow(self, line: dict[str, Any]) -> None:
        rank, delay = line["slowest_rank"], line["slowest_rank_delay"]
        host = self._process.hosts[rank]
        self._print(
            f"WARNING: rank {rank} on {host} takes {delay:.3g} s of each step longer than the others, "
            f"{100 * delay / sum(line['seconds'].values()):.0f} % of it, and they wait: see what else runs there, and "
            "how fast its disk and GPU are"
        )
        self._event("slow_rank", line["step"], rank=rank, host=host, seconds=delay)

    def _print(self, message: str) -> None:
        if self.folder:
            log(message)

    def _write(self, kind: str, **values: Any) -> None:
        if self.folder:
            self.folder.metrics.write(kind, **values)

    def _event(self, name: str, step: int, **values: Any) -> None:
        self._write("event", event=name, step=step, **values)

    def _set_state(self, state: str, step: int, reason: str = "", stopped_by: StoppedBy | None = None) -> None:
        if self.folder:
            self.folder.set_state(state, step, reason, stopped_by)
