"""A run's metrics for Prometheus: names, types and units by its conventions, each series with the label ``run``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from partialfc.tracking.console import printable

#: Gauges by their field in state.json: name, help.
_STATE_GAUGES = {
    "step": ("step", "Steps that the run has done. Goes back when it resumes from a checkpoint."),
    "total_steps": ("total_steps", "Steps of the whole run."),
    "attempt": ("attempt", "Number of this start of the run, from 1."),
    "start_step": ("start_step", "Step at which this attempt began."),
    "seconds_left": ("remaining_seconds", "Time to the last step at the current speed, without evaluations."),
}

#: Gauges by their field in the train lines of metrics.jsonl; means are over the steps since the line before.
_TRAIN_GAUGES = {
    "epoch": ("epoch", "Epochs that the run has done, at the newest train line."),
    "loss": ("loss", "Mean loss, center loss included."),
    "softmax_loss": ("softmax_loss", "Mean loss without center loss."),
    "center_loss": ("center_loss", "Mean center loss."),
    "target_cosine": ("target_cosine", "Mean cosine between an embedding and the centre of its class."),
    "grad_norm": ("grad_norm", "Mean norm of the backbone's gradient."),
    "active_rows": ("active_rows", "Rows of the classifier that took part in the last step, over all ranks."),
    "lr": ("lr", "Learning rate of the last step."),
    "slowest_rank": ("slowest_rank", "Rank with the most time of its own in the steps of the newest train line."),
    "slowest_rank_delay": ("slowest_rank_delay_seconds", "Time a step by which it exceeds the median of the others."),
    "samples_per_s": ("samples_per_second", "Training speed, without evaluations and checkpoints."),
}


@dataclass(frozen=True)
class RunBegin:
    """Position of a run at which an attempt begins: counters count from here."""

    step: int = 0
    samples: int = 0
    skipped_steps: int = 0


class RunCollector(Collector):
    """Prometheus metrics of one attempt of a run.

    Counters begin at 0 with each attempt, as Prometheus expects of a process that has restarted: a run that resumes
    from a checkpoint goes back, which ``rate()`` would take for a restart at 0 and count all its steps again.

    Args:
        run: value of the label ``run``.
        state: returns the content of state.json, and ``seconds_since_progress``.
        begin: position at which the attempt begins.
    """

    def __init__(self, run: str, state: Callable[[], dict[str, Any]], begin: RunBegin) -> None:
        self._run, self._state, self._begin = printable(run), state, begin
        self._newest: dict[str, Any] = {}  # train line
        self._evaluation: dict[str, Any] = {}
        self._checkpoint: dict[str, Any] = {}
        self._events: Counter[str] = Counter()

    def record(self, line: dict[str, Any]) -> None:
        """Record a line of metrics.jsonl (a listener of :class:`~partialfc.tracking.metrics.MetricsFile`)."""
        if line["kind"] == "train":
            self._newest = line
        elif line["kind"] == "evaluation":
            self._evaluation = line
        elif line["kind"] == "event":
            self._events = self._events + Counter([line["event"]])  # anew: another thread may read the old one
            if line["event"] == "checkpoint":
                self._checkpoint = line

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; those without a value yet are left out."""
        state, newest = self._state(), self._newest
        yield self._gauge("up", "1 while the run trains, evaluates or saves, else 0.", int(state["state"] == "running"))
        progress = state["updated"] - state["seconds_since_progress"]
        yield self._gauge("last_progress_timestamp_seconds", "Unix time of the last sign of progress.", progress)
        yield from self._gauges(_STATE_GAUGES, state)
        yield from self._gauges(_TRAIN_GAUGES, newest)
        yield from self._counters(state, newest)
        yield self._step_seconds(newest)
        yield from self._newest_checkpoint()
        yield from self._newest_evaluation()

    def _counters(self, state: dict[str, Any], newest: dict[str, Any]) -> Iterator[Metric]:
        steps = state["step"] - self._begin.step
        samples = newest.get("samples", self._begin.samples) - self._begin.samples
        skipped = newest.get("skipped_steps", self._begin.skipped_steps) - self._begin.skipped_steps
        yield self._counter("steps", "Steps done by this attempt, skipped ones included.", steps)
        yield self._counter("samples", "Samples seen by this attempt, up to the newest train line.", samples)
        yield self._counter("skipped_steps", "Steps of this attempt that all ranks skipped.", skipped)
        restarts = "Automatic restarts in a row that made no progress, up to this attempt."
        yield self._counter("restarts", restarts, state["restarts"])
        failures = "Checkpoints that this attempt could not write."
        yield self._counter("checkpoint_failures", failures, self._events["checkpoint_failed"])
        events = CounterMetricFamily("partialfc_events", "Events of this attempt.", labels=["run", "event"])
        for event, count in sorted(self._events.items()):
            events.add_metric([self._run, event], count)
        yield events

    def _step_seconds(self, newest: dict[str, Any]) -> Metric:
        seconds = GaugeMetricFamily("partialfc_step_seconds", "Mean time of a step by phase.", labels=["run", "phase"])
        for phase, value in newest.get("seconds", {}).items():
            seconds.add_metric([self._run, phase], value)
        return seconds

    def _newest_checkpoint(self) -> Iterator[Metric]:
        if self._checkpoint:
            yield self._gauge("checkpoint_step", "Step of this attempt's newest checkpoint.", self._checkpoint["step"])
            written = "Unix time at which this attempt's newest checkpoint was reported complete."
            yield self._gauge("checkpoint_timestamp_seconds", written, self._checkpoint["time"])

    def _newest_evaluation(self) -> Iterator[Metric]:
        if not self._evaluation:
            return
        yield self._gauge("evaluation_step", "Step of this attempt's newest evaluation.", self._evaluation["step"])
        written = "Unix time of this attempt's newest evaluation."
        yield self._gauge("evaluation_timestamp_seconds", written, self._evaluation["time"])
        accuracy = GaugeMetricFamily(
            "partialfc_evaluation_accuracy",
            "Share of a set's samples whose own class has the highest logit, or of its listed pairs judged right.",
            labels=["run", "set"],
        )
        tar = GaugeMetricFamily(
            "partialfc_evaluation_tar",
            "TAR (true accept rate) of a protocol at a FAR (false accept rate).",
            labels=["run", "set", "far"],
        )
        for name, found in self._evaluation["results"].items():
            if _is_number(found.get("accuracy")):
                accuracy.add_metric([self._run, printable(name)], found["accuracy"])
            for far, value in found.get("tar_at_far", {}).items():
                tar.add_metric([self._run, printable(name), far], value)
        yield from (accuracy, tar)

    def _gauges(self, described: Mapping[str, tuple[str, str]], values: dict[str, Any]) -> Iterator[Metric]:
        for field, (name, description) in described.items():
            if _is_number(values.get(field)):
                yield self._gauge(name, description, values[field])

    def _gauge(self, name: str, description: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(f"partialfc_{name}", description, labels=["run"])
        gauge.add_metric([self._run], value)
        return gauge

    def _counter(self, name: str, description: str, value: float) -> Metric:
        counter = CounterMetricFamily(f"partialfc_{name}", description, labels=["run"])
        counter.add_metric([self._run], value)
        return counter


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)  # not None, which a line holds in place of NaN
