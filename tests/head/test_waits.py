"""A GPU is not kept waiting: counts of a step's host waits and of its launches.

Counted on a simulated device (:mod:`tests.harness.simulated_gpu`), in a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from itertools import product

import pytest

from partialfc.head.softmax.products import PRECISIONS
from tests.harness import running
from tests.harness.gpu_steps import OPTIMIZERS, Record, Settings
from tests.harness.loss_cases import LOSSES

#: Most waits of a step: one for the number of active rows, if a list of them would have many places left over.
FEW_SAMPLED, WAITS = 1, 0
#: Operations that a step launches on the device, at most, if one chunk holds its classes: each costs the host about ten
#: microseconds.
LAUNCHES = {"highest": 285, "exact": 305, "fast": 285}

FOUR_LOSSES = ("arcface", "curricularface", "sub-center arcface", "uce")
STEPS = {
    **{f"{loss}, rate {rate}": Settings(loss, rate) for loss in FOUR_LOSSES for rate in (0.1, 1.0)},
    "adamw, fast": Settings("softmax", 0.1, "adamw", "fast", center_loss=True),
    "adagrad, highest": Settings("adaface", 0.1, "adagrad", "highest", bfloat16=True),
    "decayed, correct": Settings("label smoothing of arcface", 0.1, "sgd, decayed", correct_sampling=True),
    "decayed, filter": Settings("magface", 1.0, "sgd, decayed", "fast", filter_threshold=0.3, bfloat16=True),
    "noise, filter": Settings("elasticface-arc+", 0.1, center_loss=True, filter_threshold=0.2),
    "decayed, center": Settings("focal sub-center curricularface", 0.1, "sgd, decayed", "fast", center_loss=True),
    "adamw, all classes": Settings("circle", 1.0, "adamw", "highest", center_loss=True),
    "many classes": Settings(classes=300_000, memory_budget_mb=4),
    **{
        f"one chunk, {precision}, rate {rate}": Settings(sample_rate=rate, precision=precision, memory_budget_mb=64)
        for precision in PRECISIONS
        for rate in (0.1, 1.0)
    },
}
FEW_CLASSES, LOSS_READ = Settings(classes=1500), Settings(sample_rate=1.0, read_loss=True)
MICRO_BATCHES = [Settings("softmax", rate, micro_batches=3) for rate in (0.1, 1.0)]


def records(settings: Iterable[Settings]) -> list[Record]:
    """Take steps in a process of their own."""
    words = json.dumps([dataclasses.asdict(one) for one in settings])
    done = running.finish([sys.executable, "-m", "tests.harness.gpu_steps", words], seconds=900)
    assert done.returncode == 0, done.stderr
    return [Record(**fields) for fields in json.loads(done.stdout.splitlines()[-1])]


@pytest.fixture(scope="module")
def recorded() -> dict[Settings, Record]:
    all_settings = [*STEPS.values(), *MICRO_BATCHES, FEW_CLASSES, LOSS_READ]
    return dict(zip(all_settings, records(all_settings), strict=True))


def check(settings: Settings, record: Record) -> None:
    assert sum(record.waits.values()) <= WAITS, record.waits
    assert record.event_waits == 1, "for the errors of the step, which the optimizer raises"
    # The rounding of a bfloat16 weight turns on the last bit of what is rounded. So do the first steps of AdamW and
    # Adagrad on that of a gradient near 0, which they divide by its own size.
    coarse = settings.precision == "fast" or settings.optimizer in ("adamw", "adagrad")
    assert record.error <= (2e-2 if settings.bfloat16 else 2e-3 if coarse else 1e-5)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_never_waits(recorded: dict[Settings, Record], name: str) -> None:
    check(STEPS[name], recorded[STEPS[name]])


def test_a_step_on_few_classes_waits_once_for_the_number_of_active_rows(recorded: dict[Settings, Record]) -> None:
    assert sum(recorded[FEW_CLASSES].waits.values()) <= FEW_SAMPLED


@pytest.mark.slow
def test_no_loss_optimizer_or_option_waits_more_often() -> None:
    every_loss = [Settings(loss, rate) for loss, rate in product(LOSSES, (0.1, 1.0))]
    every_optimizer = [
        Settings("arcface", rate, optimizer, precision, *options)
        for rate, optimizer, precision in product((0.1, 1.0), OPTIMIZERS, ("exact", "fast"))
        for options in ((True, False, 0.3, True), (False, True, None, False))
    ]
    for settings, record in zip(steps := every_loss + every_optimizer, records(steps), strict=True):
        check(settings, record)


@pytest.mark.parametrize("name", [name for name in STEPS if name.startswith("one chunk")])
def test_a_step_launches_few_operations(recorded: dict[Settings, Record], name: str) -> None:
    settings = STEPS[name]
    record = recorded[settings]
    most = sorted(record.places.items(), key=lambda place: -place[1])[:25]
    assert record.launches <= LAUNCHES[settings.precision or "exact"], most


@pytest.mark.parametrize("settings", MICRO_BATCHES)
def test_micro_batches_merge_their_gradients_without_a_wait(
    recorded: dict[Settings, Record], settings: Settings
) -> None:
    record = recorded[settings]
    assert sum(record.waits.values()) <= WAITS, record.waits
    assert record.error <= 1e-5


def test_the_simulation_notices_a_wait(recorded: dict[Settings, Record]) -> None:
    assert recorded[LOSS_READ].waits == {"elsewhere (_local_scalar_dense)": 1}
