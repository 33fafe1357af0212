"""Metrics of a run for Prometheus: names, types, units, labels, and what each counts."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from partialfc.tracking.prometheus import RunBegin, RunCollector

STATE: dict[str, Any] = {
    "state": "running",
    "step": 240,
    "total_steps": 500,
    "attempt": 2,
    "host": "node17",
    "pid": 4410,
    "updated": 1795576655.5,
    "reason": "",
    "stopped_by": None,
    "seconds_left": 70,
    "start_step": 214,
    "restarts": 1,
    "seconds_since_progress": 1.5,
}
TRAIN: dict[str, Any] = {
    "kind": "train",
    "time": 1795576650.0,
    "step": 240,
    "epoch": 1.25,
    "samples": 24_000,
    "loss": 1.5,
    "softmax_loss": 1.25,
    "center_loss": 0.25,
    "target_cosine": 0.5,
    "grad_norm": 2.0,
    "active_rows": 640,
    "lr": 0.1,
    "skipped_steps": 5,
    "samples_per_s": 800.0,
    "seconds": {"data": 0.25, "head": 0.5},
}
RESULTS = {
    "plain": {"tar_at_far": {"0.001": 0.75, "0.0001": 0.5}, "threshold": {"0.001": 0.25}, "genuine_pairs": 9},
    "known": {"accuracy": 0.875, "samples": 74},
}


def served(*recorded: dict[str, Any], run: str = "face", begin: RunBegin = RunBegin(214, 21_400, 3)) -> dict[str, Any]:  # noqa: B008
    """The metric families after these lines, by name, as Prometheus reads them."""
    collector = RunCollector(run, lambda: STATE, begin)
    for line in recorded:
        collector.record(line)
    registry = CollectorRegistry()
    registry.register(collector)
    text = generate_latest(registry).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value_of(family: Any, **labels: str) -> float:
    (value,) = [sample.value for sample in family.samples if labels.items() <= sample.labels.items()]
    return float(value)


def event(name: str, **values: Any) -> dict[str, Any]:
    return {"kind": "event", "time": 1795576600.0, "event": name, **values}


EVERYTHING = (
    TRAIN,
    {"kind": "evaluation", "time": 1795576500.0, "step": 230, "results": RESULTS},
    event("checkpoint", step=220, path="x"),
    event("checkpoint_failed", step=230, reason="x"),
)


def test_every_metric_has_a_help_of_its_own_and_the_label_of_its_run() -> None:
    families = served(*EVERYTHING)
    assert len(families) >= 25
    helps = {family.documentation for family in families.values()}
    assert len(helps) == len(families)
    for name, family in families.items():
        words = name.removeprefix("partialfc_").replace("_", " ")
        assert family.documentation.lower().rstrip(".") != words, name
        assert " " in family.documentation, name
        assert family.documentation.endswith("."), name
        assert family.samples, name
        assert all(sample.labels["run"] == "face" for sample in family.samples), name


def test_counters_count_this_attempt_since_prometheus_takes_a_step_back_for_a_new_start_at_zero() -> None:
    families = served(*EVERYTHING)
    counters = {name: family for name, family in families.items() if family.type == "counter"}
    values = {name: value_of(family) for name, family in counters.items() if name != "partialfc_events"}
    assert values == {
        "partialfc_steps": 26,
        "partialfc_samples": 2_600,
        "partialfc_skipped_steps": 2,
        "partialfc_restarts": 1,
        "partialfc_checkpoint_failures": 1,
    }
    assert value_of(families["partialfc_events"], event="checkpoint") == 1
    for family in counters.values():
        assert all(sample.name == f"{family.name}_total" for sample in family.samples)
    assert families["partialfc_step"].type == "gauge", "the position of the run, which may go back"
    assert value_of(families["partialfc_step"]) == 240


def test_counters_are_there_from_the_start_so_that_their_first_increase_is_seen() -> None:
    families = served()
    for name in ("steps", "samples", "skipped_steps", "restarts", "checkpoint_failures"):
        assert f"partialfc_{name}" in families
    assert value_of(families["partialfc_samples"]) == 0
    assert value_of(families["partialfc_checkpoint_failures"]) == 0


def test_units_are_in_the_names() -> None:
    families = served(*EVERYTHING)
    assert value_of(families["partialfc_samples_per_second"]) == 800
    assert value_of(families["partialfc_remaining_seconds"]) == 70
    assert value_of(families["partialfc_last_progress_timestamp_seconds"]) == 1795576654
    assert value_of(families["partialfc_checkpoint_timestamp_seconds"]) == 1795576600
    assert value_of(families["partialfc_evaluation_timestamp_seconds"]) == 1795576500
    assert value_of(families["partialfc_step_seconds"], phase="head") == 0.5
    for name in families:
        assert not re.search(r"_(s|per_s|left|updated)$|seconds_(left|since)", name), name


def test_evaluations_and_checkpoints_are_metrics() -> None:
    families = served(*EVERYTHING)
    assert value_of(families["partialfc_evaluation_tar"], set="plain", far="0.001") == 0.75
    assert value_of(families["partialfc_evaluation_tar"], set="plain", far="0.0001") == 0.5
    assert value_of(families["partialfc_evaluation_accuracy"], set="known") == 0.875
    assert value_of(families["partialfc_evaluation_step"]) == 230
    assert value_of(families["partialfc_checkpoint_step"]) == 220


def test_a_number_that_is_none_has_no_series_and_hides_no_other() -> None:
    results = {"plain": {"tar_at_far": {}}, "known": {"accuracy": None, "samples": 0}}
    nothing = {"kind": "evaluation", "time": 1.0, "step": 230, "results": results}
    families = served(TRAIN | {"loss": None}, nothing)
    assert "partialfc_loss" not in families
    assert value_of(families["partialfc_lr"]) == 0.1
    assert value_of(families["partialfc_evaluation_step"]) == 230


@pytest.mark.parametrize("name", ['a "b"\\', "two\nlines", "half \udcff of a character", "\x1b[31mred"])
def test_any_name_of_a_run_or_a_set_can_be_served(name: str) -> None:
    results = {name: {"accuracy": 0.5, "samples": 2}}
    line = json.loads(json.dumps({"kind": "evaluation", "time": 1.0, "step": 1, "results": results}))
    families = served(line, run=name)
    assert value_of(families["partialfc_evaluation_accuracy"]) == 0.5
    assert value_of(families["partialfc_step"]) == 240
