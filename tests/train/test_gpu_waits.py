"""The trainer does not keep a GPU waiting: its host waits in a step, counted on a simulated device."""

from __future__ import annotations

import json
import sys

import pytest

from tests.harness import running
from tests.harness.gpu_trainer import Record

#: Most waits of a step: to know whether there is to be an update.
WAITS = 1
RUNS = {
    "the recipe": [],
    "accumulation, spikes": ["optim.accumulation=2", "optim.spike={factor: 9, window: 2}"],
    "decayed rows": ["optim.unsampled_rows=decayed"],
    "adamw": ["optim.name=adamw"],
    "float16": ["engine.precision=fp16", "head.loss={name: adaface}"],
}
FEW_SAMPLED = ["head.sample_rate=0.5"]


@pytest.fixture(scope="module")
def recorded() -> list[Record]:
    words = json.dumps([*RUNS.values(), FEW_SAMPLED])
    done = running.finish([sys.executable, "-m", "tests.harness.gpu_trainer", words], seconds=600)
    assert done.returncode == 0, done.stderr
    return [Record(**fields) for fields in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.parametrize("name", RUNS)
def test_a_training_step_waits_once_and_notes_its_results_without_a_wait(recorded: list[Record], name: str) -> None:
    record = recorded[list(RUNS).index(name)]
    assert sum(record.waits.values()) <= WAITS, record.waits
    assert not record.waits_of_metrics
    if name != "float16":  # torch's autocast finds no GPU, and leaves products in float32
        assert record.losses == pytest.approx(record.losses_on_cpu, rel=1e-4)


def test_few_sampled_classes_add_one_wait(recorded: list[Record]) -> None:
    assert sum(recorded[-1].waits.values()) <= WAITS + 1, recorded[-1].waits
