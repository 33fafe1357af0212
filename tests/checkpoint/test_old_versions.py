"""Run folders of released versions (tests/fixtures/checkpoints), resumed by today's code."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file

from tests.harness.running import finish, lines, partialfc

FIXTURES = Path(__file__).parents[1] / "fixtures" / "checkpoints"
PADDED_RUN = FIXTURES.parents[1] / "harness" / "padded_run.py"
RUNS = sorted(str(path.parent.relative_to(FIXTURES)) for path in FIXTURES.glob("*/*/expected.json"))


def param(*values: Any, quick: bool) -> Any:
    return pytest.param(*values, marks=[] if quick else pytest.mark.slow)


def runs(*quick: str) -> list[Any]:
    """Return all runs; those not named are slow tests."""
    return [param(run, quick=run in quick) for run in RUNS]


def expected_of(run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FIXTURES / run / "expected.json").read_text())
    return found


def newest_checkpoint(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step-*"))


def copied(run: str, to: Path) -> Path:
    """Copy a run folder, with its data sets beside it; return the copy."""
    for path in (FIXTURES / run).parent.glob("data*"):
        shutil.copytree(path, to / path.name)
    return shutil.copytree(FIXTURES / run, to / "run")


def start(*words: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """``partialfc`` with these words, under torchrun if there is more than one rank; it must succeed."""
    done = partialfc(*words, ranks=ranks if ranks > 1 else 0)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def train(
    folder: Path, data: str, *overrides: str, ranks: int, padded: bool = True
) -> subprocess.CompletedProcess[str]:
    """Resume a copied run with its own config, and check that it finishes.

    Args:
        padded: let its backbone see the padding of short batches, as the old versions did.
    """
    program = [str(PADDED_RUN)] if padded else ["-m", "partialfc"]
    words = ["train", str(folder / "config.yaml"), f"run.dir={folder}", f"data.train={folder.parent / data}"]
    done = finish([sys.executable, *program, *words, *overrides], ranks=ranks if ranks > 1 else 0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((folder / "state.json").read_text())["state"] == "finished"
    return done


def check_lines(folder: Path, run: str, expected: list[dict[str, Any]], rel: float = 1e-5) -> None:
    """Check that all steps are there once, those after the checkpoint as the old version computed them."""
    step = expected_of(run)["step"]
    found = lines(folder, "train")
    assert [line["step"] for line in found] == list(range(1, expected[-1]["step"] + 1))
    assert [line["step"] for line in lines(folder, "event") if line["event"] == "started"] == [0, step]
    assert len(expected) > 5, "too few steps to compare"
    for line, known in zip(found[step:], expected, strict=True):
        assert {key: line[key] for key in known} == pytest.approx(known, rel=rel, abs=rel)


def needs_deepspeed(run: str) -> None:
    if "/zero" in run and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("not installed: DeepSpeed; pip install -c constraints.txt '.[deepspeed]'")


def described(value: torch.Tensor) -> str:
    return f"{value.dtype} {list(value.shape)} {hashlib.sha256(value.numpy().tobytes()).hexdigest()}"


def test_runs_of_every_kind_are_there() -> None:
    assert {f"0.1/{name}" for name in ("ddp", "zero1", "zero3", "center_loss", "uce")} <= set(RUNS)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("run", RUNS)
def test_torch_alone_reads_the_checkpoint(run: str) -> None:
    checkpoint = newest_checkpoint(FIXTURES / run)
    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    assert {name: described(value) for name, value in tensors.items()} == expected_of(run)["tensors"]


QUICK = {"0.1/ddp": 2, "0.1/zero1": 1, "0.1/zero3": 1, "0.1/center_loss": 1, "0.1/uce": 1}


@pytest.mark.parametrize(
    ("run", "ranks"), [param(run, ranks, quick=QUICK.get(run) == ranks) for run in RUNS for ranks in (1, 2)]
)
def test_a_run_finishes_as_the_old_version_would(tmp_path: Path, run: str, ranks: int) -> None:
    needs_deepspeed(run)
    folder = copied(run, tmp_path)
    checkpoint = newest_checkpoint(folder)
    assert f"({checkpoint}, written on " in train(folder, "data", ranks=ranks).stdout
    assert lines(folder, "train")[-1]["step"] == expected_of(run)["total_steps"]
    check_lines(folder, run, expected_of(run)["resumed"][str(ranks)])


@pytest.mark.parametrize("run", ["0.1/uce"])
def test_a_run_keeps_its_short_batches_though_new_ones_drop_them(tmp_path: Path, run: str) -> None:
    folder = copied(run, tmp_path)
    expected = expected_of(run)["resumed"]["1"]
    done = train(folder, "data", ranks=1, padded=False)
    assert "changed since the checkpoint: data.last_batch" not in done.stdout
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["last_batch"] == "keep"
    found = lines(folder, "train")[expected_of(run)["step"] :]
    assert [line["samples"] for line in found] == [line["samples"] for line in expected]
    assert [line["lr"] for line in found] == pytest.approx([line["lr"] for line in expected])
    whole = [line["step"] for line in found].index(10)  # where no batch is short yet
    losses = [[line["loss"] for line in each] for each in (found, expected)]
    assert losses[0][:whole] == pytest.approx(losses[1][:whole], rel=1e-5)
    assert losses[0][whole] != pytest.approx(losses[1][whole], rel=1e-5), "padding counted in batch statistics"


def test_short_batches_are_dropped_from_an_old_run_only_by_force(tmp_path: Path) -> None:
    folder = copied("0.1/uce", tmp_path)
    words = ["train", folder / "config.yaml", f"run.dir={folder}", f"data.train={tmp_path}/data"]
    refused = partialfc(*words, "data.last_batch=drop")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "data.last_batch: 'keep' before, 'drop' now (needs --force)" in refused.stderr
    start(*map(str, words), "data.last_batch=drop", "--force")
    found = lines(folder, "train")
    assert found[-1]["samples"] - found[6]["samples"] == 8 * (len(found) - 7), "whole batches only"
    assert found[-1]["epoch"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("run", [run for run in RUNS if "/zero" in run])
def test_a_deepspeed_run_resumes_without_it(tmp_path: Path, run: str) -> None:
    folder = copied(run, tmp_path)
    train(folder, "data", "engine.name=ddp", ranks=2)
    check_lines(folder, run, expected_of(run)["resumed"]["2"], rel=1e-4)


@pytest.mark.parametrize("run", runs("0.1/zero1", "0.1/center_loss"))
def test_a_run_grows_as_the_old_version_would(tmp_path: Path, run: str) -> None:
    needs_deepspeed(run)
    folder = copied(run, tmp_path)
    done = train(folder, "data-grown", "checkpoint.grow=true", ranks=1)
    assert "grown from 9 to 11 classes" in done.stdout
    check_lines(folder, run, expected_of(run)["grown"]["1"])


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_run_grows_on_two_ranks(tmp_path: Path, run: str) -> None:
    needs_deepspeed(run)
    folder = copied(run, tmp_path)
    done = train(folder, "data-grown", "checkpoint.grow=true", "checkpoint.grow_init=embedding", ranks=2)
    assert "grown from 9 to 11 classes" in done.stdout
    assert lines(folder, "train")[-1]["step"] == expected_of(run)["grown"]["1"][-1]["step"]


@pytest.mark.parametrize("run", runs("0.1/ddp", "0.1/zero3"))
def test_a_run_is_exported(tmp_path: Path, run: str) -> None:
    folder = copied(run, tmp_path)
    start("export", str(folder), "--out", str(tmp_path / "export"), "--centers", "--no-onnx")
    tensors = expected_of(run)["tensors"]
    found = {
        f"backbone.{name}": value for name, value in load_file(tmp_path / "export" / "backbone.safetensors").items()
    }
    known = {name: value for name, value in tensors.items() if name.startswith("backbone.")}
    assert {name: described(value) for name, value in found.items()} == known
    assert {path.name for path in (tmp_path / "export").iterdir()} >= {"class_centers.npy", "classes.jsonl"}


@pytest.mark.parametrize("run", runs("0.1/zero1"))
def test_a_checkpoint_is_inspected_and_merged(tmp_path: Path, run: str) -> None:
    expected = expected_of(run)
    checkpoint = newest_checkpoint(FIXTURES / run)
    told = start("checkpoint", "inspect", str(checkpoint)).stdout
    assert f"step {expected['step']}, " in told
    assert "all digests match" in told
    assert all(name in told for name in expected["tensors"])
    start("checkpoint", "merge", str(FIXTURES / run), str(tmp_path / "merged.safetensors"))
    merged = load_file(tmp_path / "merged.safetensors")
    assert {name: described(value) for name, value in merged.items()} == expected["tensors"]


@pytest.mark.parametrize("run", runs("0.1/uce"))
def test_a_run_is_evaluated(tmp_path: Path, run: str) -> None:
    folder = copied(run, tmp_path)
    start("evaluate", str(folder), "--set", str(tmp_path / "data"))
    (results,) = (folder / "evaluation").rglob("*.json")
    known = expected_of(run)["evaluation"]["data"]
    assert json.loads(results.read_text())["data"] == pytest.approx(known, abs=0.03), (
        "one of 36 images may be a close call"
    )
