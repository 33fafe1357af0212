"""Runs that were killed and resume: at another world size, from damaged checkpoints, with a changed config."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from partialfc.checkpoint.folders import latest_valid, step_folders
from tests.harness.running import command, lines, partialfc, run, started, wait_until

STEPS, EVERY, KILLED_AFTER = 36, 10, 20
# A learning rate at which rounding, which differs between world sizes, does not grow: the nearest sub-center is a jump.
SETTINGS = [f"checkpoint.every={EVERY}", "checkpoint.keep_last=5", "evaluation.every=0", "optim.lr=0.02"]
STATEFUL = [
    "head.loss={name: subcenter, sub_centers: 2, loss: {name: curricularface, scale: 16, margin: 0.1}}",
    "optim.unsampled_rows=decayed",
]


@pytest.fixture(scope="module")
def whole(task: Path) -> list[dict[str, Any]]:
    """Return the train lines of an uninterrupted run."""
    folder = task.parent / "whole"
    done = run(task, 2, f"run.dir={folder}", *SETTINGS, *STATEFUL)
    assert done.returncode == 0, done.stdout + done.stderr
    return lines(folder, "train")


def kill_after(config: Path, ranks: int, folder: Path, step: int) -> None:
    """Start a run and kill all of its processes once the checkpoint of ``step`` is there."""
    with started(command(config, ranks, f"run.dir={folder}", *SETTINGS, *STATEFUL), None) as process:
        wait_until((folder / "checkpoints" / f"step-{step:08d}").exists, of=process)


@pytest.fixture(scope="module")
def killed(task: Path) -> dict[int, Path]:
    """Run folders of runs on 1, 2 and 3 ranks that were killed after a checkpoint."""
    folders = {}
    for ranks in (1, 2, 3):
        folders[ranks] = task.parent / f"killed{ranks}"
        kill_after(task, ranks if ranks > 1 else 0, folders[ranks], KILLED_AFTER)
    return folders


QUICK = {(1, 3), (2, 1), (2, 2), (3, 2), (3, 4)}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(before, after, marks=() if (before, after) in QUICK else pytest.mark.slow)
        for before in (1, 2, 3)
        for after in (1, 2, 3, 4)
    ],
)
def test_a_killed_run_resumes_at_any_world_size_as_if_nothing_had_happened(
    task: Path, whole: list[dict[str, Any]], killed: dict[int, Path], before: int, after: int
) -> None:
    folder = task.parent / f"killed{before}on{after}"
    shutil.copytree(killed[before], folder)
    for path in step_folders(folder / "checkpoints"):
        if int(path.name[5:]) > KILLED_AFTER:  # the kill came late
            shutil.rmtree(path)
    done = run(task, after if after > 1 else 0, f"run.dir={folder}", *SETTINGS, *STATEFUL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"step-{KILLED_AFTER:08d}, written on {before} ranks" in done.stdout
    train = lines(folder, "train")
    assert [line["step"] for line in train] == list(range(1, STEPS + 1)), "no step lost or twice"
    assert [line["samples"] for line in train] == [line["samples"] for line in whole]
    for mine, other in zip(train, whole, strict=True):
        for key in ("loss", "softmax_loss", "center_loss", "target_cosine"):
            tolerance = {"rel": 1e-5} if before == after == 2 else {"rel": 1e-4, "abs": 1e-5}  # as `whole`, or not
            assert mine[key] == pytest.approx(other[key], **tolerance), (mine["step"], key)
        assert (mine["active_rows"], mine["lr"]) == (other["active_rows"], other["lr"])
    started = [line["step"] for line in lines(folder, "event") if line["event"] == "started"]
    assert started == [0, KILLED_AFTER]
    assert json.loads((folder / "state.json").read_text())["attempt"] == 2


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(task: Path, killed: dict[int, Path]) -> None:
    folder = task.parent / "damaged"
    shutil.copytree(killed[2], folder)
    newest = folder / "checkpoints" / f"step-{KILLED_AFTER:08d}"
    for path in step_folders(folder / "checkpoints"):
        if int(path.name[5:]) > KILLED_AFTER:
            shutil.rmtree(path)
    victim = sorted(newest.glob("*.distcp"))[1]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)
    done = run(task, 2, f"run.dir={folder}", *SETTINGS, *STATEFUL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{victim.name} was modified (digest mismatch)" in done.stdout
    assert "resuming from step 10 (" in done.stdout
    assert [line["step"] for line in lines(folder, "event") if line["event"] == "started"] == [0, 10]
    assert [line["step"] for line in lines(folder, "train")] == list(range(1, STEPS + 1))


def test_damaged_or_unwanted_checkpoints_displace_no_valid_one(task: Path, killed: dict[int, Path]) -> None:
    folder = task.parent / "aside"
    shutil.copytree(killed[1], folder)
    checkpoints = folder / "checkpoints"
    for path in step_folders(checkpoints)[:-1]:  # all but step 10
        (path / ".metadata").write_bytes(b"")
    damaged = {path.name for path in step_folders(checkpoints)[:-1]}
    settings = [f"run.dir={folder}", *SETTINGS, *STATEFUL, "checkpoint.keep_last=1", "checkpoint.every=7"]
    done = run(task, 0, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"aside-1-step-{KILLED_AFTER:08d}" in done.stdout
    written = [line["step"] for line in lines(folder, "event") if line["event"] == "checkpoint"]
    assert written[-4:] == [21, 28, 35, STEPS]
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {f"step-{STEPS:08d}"} | {f"aside-1-{name}" for name in damaged}
    (checkpoints / f"step-{STEPS:08d}" / "manifest.json").write_text("")
    refused = run(task, 0, *settings, "--force", "optim.epochs=4")  # otherwise it is already finished
    assert refused.returncode != 0
    assert "all checkpoints in" in refused.stderr
    assert lines(folder, "train")[-1]["step"] == STEPS, "the earlier run is untouched"
    anew = run(task, 0, *settings, "checkpoint.resume=never", "--force")
    assert anew.returncode == 0, anew.stdout + anew.stderr
    assert [line["step"] for line in lines(folder, "train")] == list(range(1, STEPS + 1))
    found = latest_valid(checkpoints)
    assert found is not None
    assert found[1]["step"] == STEPS
    names |= {f"aside-1-step-{STEPS:08d}"}
    assert {path.name for path in checkpoints.iterdir()} == names


def test_a_changed_config_is_explained(task: Path, killed: dict[int, Path]) -> None:
    folder = task.parent / "changed"
    shutil.copytree(killed[2], folder)
    settings = [f"run.dir={folder}", *SETTINGS, *STATEFUL]
    refused = run(task, 2, *settings, "optim.lr=0.01")
    assert refused.returncode != 0
    assert "optim.lr: 0.02 before, 0.01 now (needs --force)" in refused.stderr
    impossible = run(task, 0, *settings, "model.embedding_dim=16", "--force")
    assert impossible.returncode == 2
    assert "model.embedding_dim: 32 before, 16 now (impossible)" in impossible.stderr
    assert "choose another run.dir" in impossible.stderr
    forced = run(task, 0, *settings, "optim.lr=0.01", "tracking.log_every=2", "--force")
    assert forced.returncode == 0, forced.stdout + forced.stderr
    assert "tracking.log_every: 1 before, 2 now (harmless)" in forced.stdout


def test_inspect_prints_the_contents_of_a_checkpoint(killed: dict[int, Path]) -> None:
    checkpoint = killed[3] / "checkpoints" / f"step-{KILLED_AFTER:08d}"
    done = partialfc("checkpoint", "inspect", checkpoint)
    assert done.returncode == 0, done.stderr
    for words in (
        f"step {KILLED_AFTER}, ",
        "written on 3 ranks",
        "37 classes",
        "all digests match",
        "head.weight  [37, 2, 32] float32, in 3 parts",
        "head.loss.base.state  [1] float64",
    ):
        assert words in done.stdout
    newest = partialfc("checkpoint", "inspect", killed[3])
    assert newest.stdout.splitlines() == [str(checkpoint), *done.stdout.splitlines()]


def test_training_continues_when_the_disk_is_full(task: Path, small_disk: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(small_disk)
    (small_disk / "ballast").write_bytes(bytes(800_000))
    done = run(task, 2, f"run.dir={folder}", *SETTINGS, "optim.epochs=2")
    assert done.returncode != 0, "without the last checkpoint a run is not finished"
    failures = [line for line in lines(folder, "event") if line["event"] == "checkpoint_failed"]
    assert [line["step"] for line in failures] == [10, 20]
    assert "training continues without it" in done.stdout
    assert [line["step"] for line in lines(folder, "train")] == list(range(1, 25))
    assert json.loads((folder / "state.json").read_text())["state"] == "failed"
    (small_disk / "ballast").unlink()


@pytest.mark.slow
def test_twenty_kills_while_saving_never_cost_the_last_checkpoint(task: Path) -> None:
    folder, undisturbed = task.parent / "twenty", task.parent / "undisturbed"
    rng = np.random.default_rng(3)
    # Saving brings decayed rows up to date, which rounds: a run to compare with must save as often.
    always = ["checkpoint.every=1", "evaluation.every=0", *STATEFUL]
    assert run(task, 2, f"run.dir={undisturbed}", *always).returncode == 0
    whole = lines(undisturbed, "train")
    settings = [f"run.dir={folder}", *always]
    for kill in range(20):
        with started(command(task, 2, *settings), None) as process:
            before = {path.name for path in step_folders(folder / "checkpoints")} if folder.exists() else set()
            deadline = time.monotonic() + 90
            while process.poll() is None and time.monotonic() < deadline:
                now = {path.name for path in step_folders(folder / "checkpoints")} if folder.exists() else set()
                if now - before:  # it is saving after every step from here on
                    break
                time.sleep(0.005)
            time.sleep(float(rng.uniform(0, 0.15)))
        assert latest_valid(folder / "checkpoints") is not None, kill
        if lines(folder, "train")[-1]["step"] >= STEPS - 2:
            break
    done = run(task, 2, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    train = lines(folder, "train")
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    for mine, other in zip(train, whole, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
