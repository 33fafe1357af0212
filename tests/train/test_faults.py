"""Numbers that break on one rank: all ranks skip the step, count it, name the rank, and stop in time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from partialfc import CenterLoss, PartialFC, losses
from partialfc.build.engine import build_engine
from partialfc.config import parse_config
from partialfc.runtime.process import ProcessContext
from partialfc.runtime.stopping import StopRequest
from partialfc.train.loss_spikes import SpikeRule
from partialfc.train.step_check import nonfinite_classes
from tests.harness.running import events, finish, lines, run, state

FAULTY = str(Path(__file__).parents[1] / "harness" / "faulty_run.py")
QUICK = ["evaluation.every=0", "evaluation.sets=[]", "optim.epochs=1"]  # 12 steps


def faulty(
    ranks: int, task: Path, folder: Path, fault: str, rank: int, steps: str, *more: str
) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, FAULTY, str(task), fault, str(rank), steps, f"run.dir={folder}", *QUICK, *more]
    return finish(words, ranks=ranks)


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {
        "head.weight": torch.zeros(37, 32),
        "head.optimizer.weight.momentum_buffer": torch.zeros(37, 32),
        "head.center_loss.centers": torch.zeros(37, 32),
        "head.step": torch.zeros((), dtype=torch.int64),
        "backbone.embedding.weight": torch.zeros(32, 768),
    }
    dcp.load(tensors, checkpoint_id=folder / "checkpoints" / "step-00000012", no_dist=True)
    return tensors


@pytest.fixture(scope="module")
def skipped_alone(task: Path) -> Path:
    """A single process that skips the same steps."""
    folder = task.parent / "alone"
    done = faulty(0, task, folder, "gradient", 0, "4,5")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("fault", ["embeddings", "gradient", "row_gradient"])
def test_a_fault_on_one_rank_is_skipped_by_all_and_attributed_to_it(
    task: Path, tmp_path: Path, skipped_alone: Path, fault: str
) -> None:
    folder = tmp_path / "run"
    done = faulty(2, task, folder, fault, 1, "4,5")
    assert done.returncode == 0, done.stdout + done.stderr
    skips = events(folder, "skipped_step")
    assert [line["step"] for line in skips] == [4, 5]
    words = {"embeddings": "embeddings", "gradient": "backbone's gradient", "row_gradient": "head's shard"}
    for line in skips:
        (found,) = line["faults"]
        assert found["rank"] == 1
        assert words[fault] in found["what"]
        assert found["samples"] == (1 if fault == "embeddings" else 10)
        assert all(key.startswith("c") for key in found["keys"])
        assert f"step {line['step']} is skipped on all ranks: rank 1" in done.stdout
    train = lines(folder, "train")
    assert [line["step"] for line in train] == list(range(1, 13))
    assert [line["samples"] for line in train][-1] == 222, "no sample is lost or repeated"
    assert [line["skipped_steps"] for line in train] == [0, 0, 0, 1, *[2] * 8]
    assert train[3]["loss"] is None, "a skipped step has no loss"
    assert train[5]["loss"] is not None
    # Nothing of a skipped step is left: whoever breaks it, the rest of the run is the same.
    ours, theirs = final_state(folder), final_state(skipped_alone)
    assert int(ours["head.step"]) == 12, "it counts skipped steps, too: they have drawn negatives"
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5, msg=name)
        assert value.double().abs().sum() > 0, name


def test_skipped_steps_stay_counted_when_a_run_resumes(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ["checkpoint.every=6", "run.skipped_in_a_row=3"]
    first = faulty(0, task, folder, "gradient", 0, "4,9,10,11", *settings)
    assert first.returncode == 1, "three in a row"
    again = run(task, 0, f"run.dir={folder}", *QUICK, *settings)
    assert again.returncode == 0, again.stdout + again.stderr
    train = lines(folder, "train")
    assert [line["step"] for line in train] == list(range(1, 13))
    assert train[-1]["skipped_steps"] == 1, "those after the checkpoint were done again, and well"


def test_a_broken_shard_ends_the_run_with_a_diagnosis_and_the_last_checkpoint_intact(
    task: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    settings = ["head.sample_rate=1", "checkpoint.every=2", "run.skipped_in_a_row=4"]
    done = faulty(2, task, folder, "shard", 1, "5", *settings)
    assert done.returncode == 1
    found = state(folder)
    assert found["state"] == "failed"
    # 37 classes over two ranks: the second has those from 19 on, and its third row is broken.
    for words in ("4 steps in a row", "rank 1", "class 21", "newest checkpoint, of step 4"):
        assert words in found["reason"], words
    assert [line["step"] for line in events(folder, "skipped_step")] == [5, 6, 7, 8]
    failed = events(folder, "checkpoint_failed")
    assert [line["step"] for line in failed] == [6]
    assert "head.weight holds NaN or Inf" in failed[0]["reason"]
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000002", "step-00000004"]
    again = run(task, 2, f"run.dir={folder}", *QUICK, *settings)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming from step" in again.stdout
    assert lines(folder, "train")[-1]["loss"] is not None


def test_after_a_loss_spike_a_run_rolls_back_and_continues_with_the_next_samples(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ["optim.epochs=4", "checkpoint.every=10", "optim.spike={factor: 2, window: 5}"]
    done = faulty(2, task, folder, "backbone", 0, "34", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    (spike,) = events(folder, "spike")
    assert spike["step"] == 34
    assert spike["rolled_back_to"].endswith("step-00000030")
    train = lines(folder, "train")
    assert [line["step"] for line in train] == list(range(1, 49)), "steps never go back"
    assert [line["samples"] for line in train][-1] == 222 * 4
    before = sum(line["loss"] for line in train[28:33]) / 5
    after = sum(line["loss"] for line in train[34:39]) / 5
    assert after < 1.3 * before, "the weights are those of the checkpoint again"
    assert train[33]["skipped_steps"] == 1


@pytest.mark.parametrize("every", [0, 2])
def test_repeated_loss_spikes_end_the_run_with_or_without_a_checkpoint(task: Path, tmp_path: Path, every: int) -> None:
    folder = tmp_path / "run"
    settings = ["optim.epochs=4", f"checkpoint.every={every}", "optim.spike={factor: 1.5, window: 5}"]
    done = faulty(0, task, folder, "backbone", 0, "9-", *settings, "run.skipped_in_a_row=4")
    assert done.returncode == 1, done.stdout + done.stderr
    assert [line["step"] for line in events(folder, "spike")] == [9, 10, 11, 12]
    for words in ("4 steps in a row were skipped", "jump of the loss", "optim.lr"):
        assert words in state(folder)["reason"], words


def test_a_spike_is_judged_by_the_running_mean_and_survives_a_restart() -> None:
    rule = SpikeRule(factor=2.0, window=4)
    assert not any(rule.is_spike(loss) for loss in (9.0, 1.0, 1.0, 1.0)), "nothing is one before the window is full"
    assert rule.mean == pytest.approx(3.0)
    assert rule.is_spike(6.1)
    assert not rule.is_spike(5.9), "a spike has not entered the mean"
    assert not rule.is_spike(float("nan"))
    other = SpikeRule(factor=2.0, window=4)
    other.load(rule.state())
    assert other.is_spike(2.1 * rule.mean)
    assert not other.is_spike(1.9 * rule.mean)


def test_a_skipped_step_leaves_no_trace_in_batch_statistics_their_count_included() -> None:
    """With ``momentum=None`` BatchNorm weights a batch by how many it has seen."""
    backbone = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3, momentum=None))
    config = parse_config({"data": {"train": "x"}})
    engine = build_engine(backbone, config, ProcessContext(0, 1, torch.device("cpu"), StopRequest(None)))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    for skipped in (True, False):
        engine.begin_step(0.1)
        embeddings = engine.forward(torch.randn(8, 4), 8)
        engine.backward(embeddings, torch.ones_like(embeddings), last=True)
        engine.finish_backward()
        if skipped:
            engine.skip()
        unchanged = {name for name, value in backbone.state_dict().items() if torch.equal(value, before[name])}
        assert not skipped or unchanged == set(before)
    assert not unchanged & {"1.running_mean", "1.running_var", "1.num_batches_tracked"}, "the test can fail"


@pytest.mark.parametrize("sub_centers", [False, True])
def test_broken_rows_are_found_wherever_they_are(sub_centers: bool) -> None:
    loss: Any = losses.SubCenter(losses.ArcFace(), 2) if sub_centers else losses.Softmax(bias=True)
    head = PartialFC(40_000, 4, loss, center_loss=CenterLoss())
    assert nonfinite_classes(head).tolist() == []
    head.weight.data[3] = torch.nan
    head.weight.data[20_000, ..., 1] = torch.inf
    assert head.center_loss is not None
    head.center_loss.centers[39_999, 0] = -torch.inf
    expected = [3, 20_000, 39_999]
    if head.bias is not None:
        head.bias.data[5] = torch.nan
        expected.insert(1, 5)
    assert nonfinite_classes(head).tolist() == expected


def test_a_head_reports_if_its_own_gradient_is_finite() -> None:
    head = PartialFC(20, 4, losses.CosFace(), center_loss=CenterLoss(), on_nonfinite="propagate")
    embeddings = torch.randn(6, 4, requires_grad=True)
    labels = torch.arange(6)
    assert bool(head.gradient_is_finite()), "there is none"
    head(embeddings, labels).loss.backward()
    assert bool(head.gradient_is_finite())
    head.weight.grad._values()[3, 1] = torch.inf
    assert not bool(head.gradient_is_finite())
    head.zero_grad()
    broken = embeddings.detach().clone()
    broken[2, 2] = torch.nan
    head(broken, labels).loss.backward()
    assert not bool(head.gradient_is_finite())
