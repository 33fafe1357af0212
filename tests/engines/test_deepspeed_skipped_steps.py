"""Steps skipped under DeepSpeed: by all ranks, at every ZeRO stage, without a trace."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.harness.engine_runs import (
    NEEDS_FP16,
    SPLIT,
    STAGES,
    TWELVE,
    applied,
    curve,
    folder_of,
    of_ranks,
    train_all,
    zero,
)
from tests.harness.machine import no_fp16
from tests.harness.running import events, lines

pytest.importorskip("deepspeed", reason="not installed: DeepSpeed; pip install -c constraints.txt '.[deepspeed]'")

pytestmark = pytest.mark.timeout(900)  # a fixture is many runs

FAULTY = {
    "ddp": [],
    **{f"zero{stage}": zero(stage) for stage in STAGES},
    **{f"zero{stage}-offload": zero(stage, "engine.offload=cpu") for stage in SPLIT},
}

FEW = ("ddp", "zero3")  # in fp16; the others are slow tests

UNEVEN = {  # parameters that two ranks cannot share evenly, one that only one of them has, one that gets no gradient
    "odd": ["data.image_size=15"],
    "tiny": ["model.name=tests.harness.backbones:tiny_first"],
    "unused": ["model.name=tests.harness.backbones:unused_first"],
}


@pytest.fixture(scope="module")
def uneven(task: Path) -> Path:
    """Runs in which a shard of the head breaks step 4, named KIND-ENGINE."""
    engines = {"ddp": [], **{f"zero{stage}": zero(stage) for stage in SPLIT}, "offload": zero(3, "engine.offload=cpu")}
    runs = {
        f"{kind}-{name}": [*TWELVE, *engine, *settings]
        for kind, settings in UNEVEN.items()
        for name, engine in engines.items()
        if (kind, name) != ("unused", "ddp")  # which DDP refuses
    }
    train_all(task, 2, runs, ["row_gradient", 1, "4"])
    return task


@pytest.mark.slow
@pytest.mark.parametrize("kind", UNEVEN)
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "offload"])
def test_a_skipped_step_leaves_nothing_in_any_corner_of_a_gradient(uneven: Path, kind: str, engine: str) -> None:
    found, expected = (curve(uneven, f"{kind}-{name}") for name in (engine, "zero1" if kind == "unused" else "ddp"))
    assert [step for step, loss in enumerate(found, 1) if loss is None] == [4]
    assert applied(found) == pytest.approx(applied(expected), rel=1e-4)
    assert found[-1] < found[0]


def in_fp16(fault: str, engines: Iterable[str]) -> dict[str, list[str]]:
    return {f"{fault}-fp16-{name}": [*TWELVE, *FAULTY[name], "engine.precision=fp16"] for name in engines}


@pytest.fixture(scope="module")
def faulty(task: Path) -> Path:
    """Runs in which rank 1 breaks step 9, named FAULT-PRECISION-ENGINE."""
    for fault in ("gradient", "row_gradient"):
        runs = {f"{fault}-fp32-{name}": [*TWELVE, *engine] for name, engine in FAULTY.items()}
        runs |= {} if no_fp16() else in_fp16(fault, FEW)
        normalized = ["model.name=tests.harness.backbones:normalized", *TWELVE]
        runs[f"{fault}-bf16-zero2"] = [*TWELVE, *zero(2), "engine.precision=bf16"]
        runs |= {f"{fault}-normalized-ddp": normalized, f"{fault}-normalized-zero2": [*normalized, *zero(2)]}
        train_all(task, 2, runs, [fault, 1, "9"])
    return task


@pytest.fixture(scope="module")
def others_in_fp16(task: Path) -> None:
    for fault in ("gradient", "row_gradient"):
        train_all(task, 2, in_fp16(fault, FAULTY.keys() - set(FEW)), [fault, 1, "9"])


@pytest.mark.slow
@NEEDS_FP16
@pytest.mark.parametrize("name", sorted(FAULTY.keys() - set(FEW)))
def test_in_fp16_too_under_every_engine(faulty: Path, others_in_fp16: None, name: str) -> None:
    check_that_a_fault_leaves_nothing(faulty, name, "fp16")


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "fp32") for name in FAULTY), *(pytest.param(name, "fp16", marks=NEEDS_FP16) for name in FEW)],
)
def test_a_fault_of_one_rank_is_skipped_by_all_and_leaves_nothing(faulty: Path, name: str, precision: str) -> None:
    check_that_a_fault_leaves_nothing(faulty, name, precision)


def check_that_a_fault_leaves_nothing(faulty: Path, name: str, precision: str) -> None:
    whole = set()
    for fault, words in (("gradient", "backbone's gradient"), ("row_gradient", "gradient of the head's shard")):
        run = f"{fault}-{precision}-{name}"
        first, second = of_ranks(faulty, run)
        assert first == second, "weights, skipped steps and loss scale of both ranks"
        skipped = events(folder_of(faulty, run), "skipped_step")
        assert [line["step"] for line in skipped if line["step"] == 9] == [9], "once"
        (found,) = next(line["faults"] for line in skipped if line["step"] == 9)
        assert (found["rank"], words in found["what"]) == (1, True)
        assert first["skipped"] == len(skipped)
        if precision == "fp16":
            assert first["loss_scale"]["value"] == 2.0 ** (16 - len(skipped)), "halved once a skipped step"
            last = skipped[-1]["step"]
            assert first["loss_scale"]["good_steps"] == 12 - last
        else:
            assert len(skipped) == 1
        whole.add(first["whole"])
        assert [line["step"] for line in lines(folder_of(faulty, run), "train")] == list(range(1, 13))
    assert len(whole) == 1, "whoever breaks a step, it leaves no trace"
    if precision == "fp32":
        found, expected = (applied(curve(faulty, f"gradient-fp32-{engine}")) for engine in (name, "ddp"))
        assert found == pytest.approx(expected, rel=1e-4)


def test_a_skipped_step_leaves_batch_statistics_alone(faulty: Path) -> None:
    for fault in ("gradient", "row_gradient"):
        found, expected = (curve(faulty, f"{fault}-normalized-{name}") for name in ("zero2", "ddp"))
        assert found[8] is None
        assert applied(found) == pytest.approx(applied(expected), rel=1e-4)
        first, second = of_ranks(faulty, f"{fault}-bf16-zero2")
        assert first == second
        assert first["skipped"] == 1
