"""The trainer as users start it: real processes, real torchrun."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from partialfc.train.schedule import lr_factor
from tests.harness.running import (
    TRAIN_HURRIED,
    Process,
    children,
    lines,
    ranks_of,
    run,
    state,
    steps_done,
    wait_until,
)
from tests.harness.tasks import write_task


@pytest.fixture(scope="module")
def finished(task: Path) -> dict[int, Path]:
    """Run folders of the same training on 1 (no torchrun), 2 and 3 ranks."""
    folders = {}
    for ranks in (0, 2, 3):
        folders[ranks] = task.parent / f"run{ranks}"
        done = run(task, ranks, f"run.dir={folders[ranks]}")
        assert done.returncode == 0, done.stdout + done.stderr
        (folders[ranks] / "stdout.txt").write_text(done.stdout)
    return folders


def test_the_run_is_the_same_at_one_two_and_three_ranks(finished: dict[int, Path]) -> None:
    alone = lines(finished[0], "train")
    assert [line["step"] for line in alone] == list(range(1, 37)), "37 classes × 6 in batches of 20, three epochs"
    assert alone[-1]["loss"] < 0.6 * alone[0]["loss"], "the run must learn for the comparison to mean something"
    for ranks in (2, 3):
        others = lines(finished[ranks], "train")
        for mine, other in zip(alone, others, strict=True):
            for key in ("loss", "softmax_loss", "center_loss", "target_cosine"):
                assert other[key] == pytest.approx(mine[key], rel=1e-4, abs=1e-5), (ranks, mine["step"], key)
            # Rounding differs between world sizes, and what it does to a gradient grows with the steps before.
            assert other["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-2), (ranks, mine["step"])
            for key in ("step", "epoch", "samples", "active_rows", "lr", "skipped_steps"):
                assert other[key] == mine[key], (ranks, key)
    results = {ranks: lines(folder, "evaluation")[-1]["results"] for ranks, folder in finished.items()}
    assert results[0]["known"]["accuracy"] > 0.2, "chance is 0.03"
    for ranks in (2, 3):
        assert results[ranks]["known"] == pytest.approx(results[0]["known"], abs=0.03)
        assert results[ranks]["plain"]["tar_at_far"] == pytest.approx(results[0]["plain"]["tar_at_far"], abs=0.03)
        assert results[ranks]["plain"]["genuine_pairs"] == results[0]["plain"]["genuine_pairs"]


def test_train_lines_carry_what_the_format_promises(finished: dict[int, Path]) -> None:
    promised = (
        "step epoch samples loss softmax_loss center_loss target_cosine active_rows lr grad_norm skipped_steps "
        "samples_per_s seconds"
    )
    for line in lines(finished[2], "train"):
        assert set(promised.split()) <= set(line)
        assert set(line["seconds"]) == {"data", "forward", "head", "backward", "update"}
        assert line["loss"] == pytest.approx(line["softmax_loss"] + line["center_loss"], rel=1e-4)
    assert [line["samples"] for line in lines(finished[2], "train")][-1] == 37 * 6 * 3, "each sample once an epoch"
    assert [line["step"] for line in lines(finished[2], "evaluation")] == [20, 36]


def test_the_run_folder_is_complete(finished: dict[int, Path]) -> None:
    folder = finished[2]
    found = state(folder)
    assert (found["state"], found["step"], found["total_steps"], found["attempt"]) == ("finished", 36, 36, 1)
    assert {"host", "pid", "updated", "reason"} <= set(found)
    assert (folder / "evaluation" / "roc-step-00000036.png").stat().st_size > 10_000
    assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["power"] == 2.0, "resolved"
    hidden = [path.name for path in folder.rglob(".*")]
    assert sorted(hidden) == [".lock", ".metadata"], "DCP's own, and the folder's; no temporary files stay"
    output = (folder / "stdout.txt").read_text()
    for words in ("training  36/36 (100%)", "plain: TAR at FAR 0.001", "known: accuracy", "images/s", str(folder)):
        assert words in output


def test_micro_batches_are_one_large_batch(task: Path) -> None:
    found = {}
    for parts in (1, 3):
        folder = task.parent / f"parts{parts}"
        changes = [f"run.dir={folder}", f"optim.accumulation={parts}", "head.sample_rate=1", "optim.epochs=1"]
        done = run(task, 2, *changes, "evaluation.every=0")
        assert done.returncode == 0, done.stdout + done.stderr
        found[parts] = lines(folder, "train")
        assert f"head memory: {32 * 4 * 3} bytes per class" in done.stdout, "weight, momentum, center"
    assert len(found[1]) == 12
    for one, three in zip(found[1], found[3], strict=True):
        for key in ("loss", "softmax_loss", "center_loss", "target_cosine"):
            assert three[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), (one["step"], key)
        assert (three["samples"], three["step"]) == (one["samples"], one["step"])


def test_micro_batches_hold_the_same_samples_at_any_world_size(task: Path) -> None:
    loss = "head.loss={name: elastic_arcface, scale: 16, margin: 0.1, std: 0.2, plus: true}"
    found = {}
    for ranks in (0, 3):
        folder = task.parent / f"micro{ranks}"
        changes = [f"run.dir={folder}", "optim.accumulation=3", loss, "optim.epochs=2", "evaluation.every=0"]
        done = run(task, ranks, *changes)
        assert done.returncode == 0, done.stdout + done.stderr
        found[ranks] = [line["loss"] for line in lines(folder, "train")]
    assert found[3] == pytest.approx(found[0], rel=1e-4)


OPTIMIZERS = {
    "decayed rows in bfloat16": [
        "optim.unsampled_rows=decayed",
        "head.weight_dtype=bfloat16",
        "optim.head_state_dtype=bfloat16",
    ],
    "adamw": ["optim.name=adamw", "optim.lr=2e-3", "optim.head_lr_factor=1"],
    "adagrad for the head, all classes at the end": [
        "optim.head=adagrad",
        "optim.head_lr_factor=1",
        "head.sample_rate_schedule={schedule: steps, rates: [0.3, 1.0], epochs: [0, 2]}",
    ],
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_optimizers_train_too(name: str, task: Path) -> None:
    folder = task.parent / name.replace(" ", "-").replace(",", "")
    done = run(task, 2, f"run.dir={folder}", *OPTIMIZERS[name], "evaluation.every=0")
    assert done.returncode == 0, done.stdout + done.stderr
    train = lines(folder, "train")
    assert train[-1]["loss"] < 0.8 * train[0]["loss"]
    if "all classes" in name:
        assert [line["active_rows"] for line in train][24:] == [37] * 12
        assert max(line["active_rows"] for line in train[:24]) < 37
        assert "a step at sample rate 1 takes up to" in done.stdout, "the largest rate is what has to fit"


STATES = {
    "uce": ({"name": "uce", "scale": 16}, {"loss.bias": (1,), "optimizer.loss.bias.momentum_buffer": (1,)}),
    "focal sub-center curricularface": (
        {
            "name": "focal",
            "loss": {"name": "subcenter", "sub_centers": 2, "loss": {"name": "curricularface", "scale": 16}},
        },
        {"loss.base.base.state": (1,), "weight": (37, 2, 32), "optimizer.weight.momentum_buffer": (37, 2, 32)},
    ),
    "label smoothing": (
        {"name": "label_smoothing", "loss": {"name": "softmax"}},
        {"bias": (37,), "optimizer.bias.momentum_buffer": (37,)},
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_the_state_and_parameters_of_a_loss_are_trained_logged_and_saved(name: str, tmp_path: Path) -> None:
    spec, expected = STATES[name]
    tree = write_task(tmp_path)
    tree["head"] |= {"loss": spec, "sample_rate": 0.5}
    tree["optim"]["epochs"] = 1
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    done = run(config, 2)
    assert done.returncode == 0, done.stdout + done.stderr
    train = lines(tmp_path / "run", "train")
    assert train[-1]["loss"] < train[0]["loss"]
    assert lines(tmp_path / "run", "evaluation")[-1]["results"]["known"]["accuracy"] > 0
    dtypes = {"loss.base.base.state": torch.float64}
    tensors = {f"head.{key}": torch.zeros(shape, dtype=dtypes.get(key)) for key, shape in expected.items()}
    dcp.load(tensors, checkpoint_id=next((tmp_path / "run" / "checkpoints").iterdir()), no_dist=True)
    for key, value in tensors.items():
        assert float(value.abs().sum()) > 0, key


def test_the_checkpoint_is_whole_and_readable_at_another_world_size(finished: dict[int, Path]) -> None:
    weights = {}
    for ranks, folder in finished.items():
        checkpoint = folder / "checkpoints" / "step-00000036"
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        assert manifest["step"] == 36
        for name, file in manifest["files"].items():
            content = (checkpoint / name).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])
        tensors = {
            "head.weight": torch.zeros(37, 32),
            "head.optimizer.weight.momentum_buffer": torch.zeros(37, 32),
            "head.center_loss.centers": torch.zeros(37, 32),
            "head.step": torch.zeros((), dtype=torch.int64),
            "backbone.embedding.weight": torch.zeros(32, 768),
        }
        dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
        assert int(tensors["head.step"]) == 36
        weights[ranks] = tensors
    for ranks in (2, 3):
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[ranks][name], value, rtol=2e-2, atol=2e-3, msg=f"{ranks} {name}")
            assert float(value.abs().sum()) > 0, name


def test_a_finished_run_is_not_trained_again(task: Path, finished: dict[int, Path]) -> None:
    before = (finished[0] / "metrics.jsonl").read_bytes()
    again = run(task, 0, f"run.dir={finished[0]}")
    assert again.returncode == 0
    assert "already finished; nothing to do" in again.stdout
    assert "plain: TAR at FAR 0.001" in again.stdout
    other = run(task, 0, f"run.dir={finished[0]}", "optim.lr=0.04")
    assert other.returncode == 2
    assert "holds a finished run of a different config" in other.stderr
    assert (finished[0] / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["optim.lrr=1"], 2, "optim.lrr: unknown name 'lrr'; did you mean 'lr'?"),
        (["data.train=/nowhere"], 2, "/nowhere"),
        (["evaluation.sets=[/nowhere]"], 2, "/nowhere"),
    ],
)
def test_mistakes_end_with_their_code_and_one_line(
    task: Path, tmp_path: Path, overrides: list[str], code: int, words: str
) -> None:
    done = run(task, 0, f"run.dir={tmp_path}/run", *overrides)
    assert done.returncode == code
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists(), "nothing is written for a run that cannot start"


def test_a_run_that_diverges_fails_with_the_reason(task: Path, tmp_path: Path) -> None:
    done = run(task, 2, f"run.dir={tmp_path}/run", "optim.lr=1e30", "optim.clip=null", "optim.warmup=0")
    assert done.returncode == 1
    found = state(tmp_path / "run")
    assert found["state"] == "failed"
    assert "10 steps in a row were skipped" in found["reason"]
    assert "NaN or Inf" in found["reason"]
    assert "lower optim.lr" in found["reason"], "and what to do"
    assert lines(tmp_path / "run", "event")[-1]["event"] == "failed"


@contextlib.contextmanager
def two_ranks(task: Path, folder: Path, *more: str) -> Iterator[list[Process]]:
    """A run of two ranks without torchrun, after some steps: nobody but the ranks themselves notices a fault."""
    long = [f"run.dir={folder}", "run.timeout=5", "optim.epochs=1000", "evaluation.every=0", *more]
    words = [sys.executable, *TRAIN_HURRIED, str(task), *long]
    with (
        (folder.parent / "output").open("w") as output,
        ranks_of(words, 2, stdout=output, stderr=subprocess.STDOUT) as processes,
    ):
        wait_until(lambda: steps_done(folder) >= 3, of=processes[0])
        yield processes


@pytest.mark.parametrize("fault", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_rank_that_dies_or_hangs_is_named_by_the_others(task: Path, tmp_path: Path, fault: signal.Signals) -> None:
    folder = tmp_path / "run"
    with two_ranks(task, folder) as (first, second):
        os.kill(second.pid, fault)
        wait_until(lambda: state(folder)["state"] == "failed", seconds=40)
        second.kill()
        assert (first.wait(30), second.wait(30)) == (1, -9)
    assert "not heard from rank 1" in (tmp_path / "output").read_text()
    assert "not heard from rank 1" in state(folder)["reason"]


def test_a_rank_whose_main_thread_hangs_is_named_with_the_phase_it_hangs_in(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with two_ranks(task, folder, "data.workers=1") as (_, second):
        for worker in children(second.pid):  # the rank itself is well, and waits for its data for ever
            os.kill(worker, signal.SIGSTOP)
        wait_until(lambda: state(folder)["state"] == "failed", seconds=40)
    assert "rank 1 hangs: still in data of step" in state(folder)["reason"]


def test_the_reason_of_a_rank_that_fails_by_itself_reaches_the_run_folder(task: Path, tmp_path: Path) -> None:
    shutil.copytree(task.parent / "train", tmp_path / "train")
    shard = tmp_path / "train" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    victim = content.index(b"IDAT") + 8
    content[victim : victim + 40] = bytes(40)  # the picture of one sample; the index still fits
    shard.write_bytes(content)
    done = run(task, 2, f"run.dir={tmp_path}/run", f"data.train={tmp_path}/train")
    assert done.returncode == 1
    assert state(tmp_path / "run")["state"] == "failed"
    assert "cannot be decoded" in state(tmp_path / "run")["reason"]


def test_learning_rates_rise_from_zero_and_fall_to_zero() -> None:
    for schedule in ("cosine", "polynomial", "constant"):
        factors = [lr_factor(step, 100, 10, schedule) for step in range(101)]
        assert factors[0] == 0.0
        assert factors[10] == 1.0
        assert factors[:11] == sorted(factors[:11])
        assert factors[10:] == sorted(factors[10:], reverse=True)
        assert factors[100] == pytest.approx(1.0 if schedule == "constant" else 0.0)
    assert lr_factor(55, 100, 10, "polynomial", 2.0) == pytest.approx(0.25)
    assert lr_factor(55, 100, 10, "cosine") == pytest.approx(0.5)
    assert lr_factor(0, 100, 0, "cosine") == 1.0
    with pytest.raises(ValueError, match="schedule must be"):
        lr_factor(0, 1, 0, "linear")
