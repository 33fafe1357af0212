"""Runs under DeepSpeed that resume: at another world size, under another engine, with the loss scale they had."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from partialfc.checkpoint.folders import step_folders
from partialfc.checkpoint.manifest import read_manifest
from partialfc.config import load_config
from partialfc.exchange.export import export
from partialfc.exchange.import_weights import import_weights
from tests.harness.engine_runs import (
    LINEAR,
    NEEDS_FP16,
    SPLIT,
    TWELVE,
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

TWENTY_FOUR = ["optim.epochs=2", "checkpoint.every=10", "checkpoint.keep_last=9"]

ADAMW = ["optim.name=adamw", "optim.lr=2e-3", "optim.head_lr_factor=1"]

WHOLE = {
    "whole-ddp": [],
    "whole-zero1": zero(1),
    "whole-zero2": zero(2, *ADAMW),
    "whole-zero3": zero(3),
    "whole-bf16-zero0": zero(0, "engine.precision=bf16"),
    "whole-bf16-zero2": zero(2, "engine.precision=bf16"),
    "whole-bf16-zero3": zero(3, "engine.precision=bf16", *ADAMW),
}

WHOLE_HALF = {"whole-fp16-ddp": ["engine.precision=fp16"], "whole-fp16-zero1": zero(1, "engine.precision=fp16")}


def cut(task: Path, name: str, of: str, after: int) -> None:
    """Return a copy of a run folder as of the checkpoint of step ``after``."""
    failed = task.parent / f"{of}.failed"
    if failed.exists():
        shutil.copy(failed, task.parent / f"{name}.failed")
        return
    shutil.copytree(task.parent / of, task.parent / name)
    for path in step_folders(task.parent / name / "checkpoints"):
        if int(path.name[5:]) > after:
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def continued(task: Path) -> Path:
    half = {} if no_fp16() else WHOLE_HALF
    train_all(task, 2, {name: [*TWENTY_FOUR, *more] for name, more in (WHOLE | half).items()})
    for ranks in (1, 3):
        for stage in SPLIT:
            cut(task, f"zero{stage}-on{ranks}", f"whole-zero{stage}", 10)
    cut(task, "chain", "whole-ddp", 10)
    again = {f"again-{name}": [*TWENTY_FOUR, *more] for name, more in (WHOLE | half).items() if name != "whole-ddp"}
    for name in again:
        cut(task, name, name.removeprefix("again-"), 10)
    if half:
        cut(task, "switched-fp16", "whole-fp16-ddp", 10)
        again["switched-fp16"] = [*TWENTY_FOUR, *WHOLE_HALF["whole-fp16-zero1"]]
    train_all(task, 2, again)
    resumed = {stage: [*TWENTY_FOUR, *WHOLE[f"whole-zero{stage}"]] for stage in SPLIT}
    train_all(task, 0, {f"zero{stage}-on1": resumed[stage] for stage in SPLIT})
    train_all(task, 3, {f"zero{stage}-on3": resumed[stage] for stage in SPLIT} | {"chain": [*TWENTY_FOUR, *zero(3)]})
    cut(task, "chain-back", "chain", 20)
    train_all(task, 2, {"chain-back": TWENTY_FOUR})
    return task


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("stage", SPLIT)
def test_a_run_resumes_at_another_world_size(continued: Path, stage: int, ranks: int) -> None:
    name = f"zero{stage}-on{ranks}"
    started = [line["step"] for line in events(folder_of(continued, name), "started")]
    assert started == [0, 10]
    assert [line["step"] for line in lines(folder_of(continued, name), "train")] == list(range(1, 25))
    assert curve(continued, name) == pytest.approx(curve(continued, f"whole-zero{stage}"), rel=1e-4)


def test_a_run_resumes_under_another_engine_and_back(continued: Path) -> None:
    for name in ("chain", "chain-back"):
        assert curve(continued, name) == pytest.approx(curve(continued, "whole-ddp"), rel=1e-4), name
    assert [line["step"] for line in events(folder_of(continued, "chain-back"), "started")] == [0, 10, 20]


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "whole-ddp"])
def test_a_run_resumes_as_if_nothing_had_happened(continued: Path, name: str) -> None:
    assert curve(continued, f"again-{name}") == pytest.approx(curve(continued, name), rel=1e-6)
    assert of_ranks(continued, f"again-{name}")[0]["whole"] == of_ranks(continued, name)[0]["whole"], "bit by bit"


@NEEDS_FP16
@pytest.mark.parametrize("name", WHOLE_HALF)
def test_the_loss_scale_survives_a_restart(continued: Path, name: str) -> None:
    again, whole = of_ranks(continued, f"again-{name}")[0], of_ranks(continued, name)[0]
    assert again == whole
    assert whole["loss_scale"]["value"] < 2.0**16, "it fell before the checkpoint"


@NEEDS_FP16
def test_the_loss_scale_survives_a_change_of_engine(continued: Path) -> None:
    folder = folder_of(continued, "switched-fp16")
    kept = read_manifest(folder / "checkpoints" / "step-00000010")["counts"]["engine"]["loss_scale"]
    assert kept["value"] < 2.0**16
    last = read_manifest(folder / "checkpoints" / "step-00000020")
    skipped = {line["step"] for line in events(folder, "skipped_step")}
    fallen = sum(10 < step <= 20 for step in skipped)
    assert last["counts"]["engine"]["loss_scale"]["value"] == kept["value"] / 2**fallen


def test_imported_weights_start_a_run_of_any_engine(task: Path, tmp_path: Path) -> None:
    from tests.harness.backbones import linear

    backbone = linear(32, 1, 16)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    settings = [f"run.dir={task.parent / 'imported'}", *TWELVE, *zero(3), "optim.lr=0"]
    written = import_weights(load_config(task, settings), tmp_path / "backbone.pth", None)
    assert read_manifest(written)["config"]["engine"]["name"] == "deepspeed"
    train_all(task, 2, {"imported": settings[1:]})
    exported = export(folder_of(task, "imported"), tmp_path / "export", onnx=False, model=LINEAR).folder
    for name, value in load_file(exported / "backbone.safetensors").items():
        assert torch.equal(value, backbone.state_dict()[name]), name
