"""Ranks that were given different settings, data or code refuse to train, all with the same words."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness.data_sets import forget_digests
from tests.harness.running import ENVIRONMENT, lines, ranks_of
from tests.harness.tasks import write_set

ROOT = Path(__file__).parents[2]
OTHER_RANK = str(ROOT / "tests" / "harness" / "other_rank.py")
SHORT = ["optim.epochs=0.25", "optim.warmup=0", "evaluation.every=0"]


def start(
    task: Path, folder: Path, on_rank_1: list[str], *more: str, elsewhere: Path | None = None, **options: Any
) -> tuple[list[int], str]:
    """Exit codes and output of two ranks, the second with further words, or in another folder."""
    words = [sys.executable, OTHER_RANK, "1", *on_rank_1, "--", "train", str(task), f"run.dir={folder}", *SHORT, *more]
    output = folder.parent / "output"
    env = ENVIRONMENT | ({"OTHER_FOLDER": str(elsewhere)} if elsewhere else {})
    with (
        output.open("w") as file,
        ranks_of(words, 2, env=env, stdout=file, stderr=subprocess.STDOUT, **options) as processes,
    ):
        codes = [process.wait(60) for process in processes]
    return codes, output.read_text()


def assert_refused(codes: list[int], output: str, *differences: str) -> None:
    assert codes == [2, 2], output
    errors = [line.partition("error: ")[2] for line in output.splitlines() if "error: " in line]
    assert len(errors) == 2, output
    assert errors[0] == errors[1]
    assert "Traceback" not in output
    for words in differences:
        assert words in errors[0], words


def test_settings_of_one_rank_are_named_by_key_before_anything_waits_for_it(task: Path, tmp_path: Path) -> None:
    """Another batch, engine or backbone alone would let the ranks wait for each other."""
    other = {
        "data.global_batch_size": ("10", "20"),
        "model.name": ('"mobilefacenet"', '"glyph_net"'),
        "optim.lr": ("0.2", "0.05"),
        "optim.accumulation": ("2", "1"),
        "engine.name": ('"deepspeed"', '"ddp"'),
        "head.loss.margin": ("0.3", "0.1"),
        "tracking.log_every": ("7", "1"),
    }
    words = [f"{key}={json.loads(value)}" for key, (value, _) in other.items()]
    codes, output = start(task, tmp_path / "run", words)
    assert_refused(codes, output, *(f"{key} ({b} on rank 0; {a} on rank 1)" for key, (a, b) in other.items()))
    assert not (tmp_path / "run").exists(), "nothing is written for a run that cannot start"


def test_force_and_weights_to_start_from_on_one_rank_are_differences_too(task: Path, tmp_path: Path) -> None:
    codes, output = start(task, tmp_path / "run", ["model.pretrained=/weights.pth", "--force"])
    assert_refused(codes, output, "model.pretrained (null on rank 0; a path on rank 1)", "--force (false on rank 0")


def test_places_and_workers_may_differ(task: Path, tmp_path: Path) -> None:
    copies = {name: shutil.copytree(task.parent / name, tmp_path / "elsewhere" / name) for name in ("train", "known")}
    (copies["train"] / "samples.index").unlink(missing_ok=True)  # made anew
    index = copies["train"] / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text())))  # spaced in another way
    other = [f"data.train={copies['train']}", "data.workers=1", f"evaluation.sets=[{copies['known']}]"]
    codes, output = start(task, tmp_path / "run", other, f"evaluation.sets=[{task.parent / 'known'}]")
    assert codes == [0, 0], output
    assert len(lines(tmp_path / "run", "train")) == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("set", "data.train: images"),
        ("table", "data.train: classes.jsonl"),  # in a folder without digests, which would show it first
        ("pixels", "data.train: images"),
        ("protocol", "evaluation.sets[0]: protocol.json"),
    ],
)
def test_data_of_one_rank_with_another_content_is_refused(task: Path, tmp_path: Path, change: str, named: str) -> None:
    train, verification = (shutil.copytree(task.parent / name, tmp_path / name) for name in ("train", "verification"))
    if change == "set":  # of the same size
        shutil.rmtree(train)
        write_set(train, 37, 6, seed=9)
    elif change == "table":
        table = train / "classes.jsonl"
        table.write_text(table.read_text().replace('"class 3"', '"class three"'))
        forget_digests(train)
    elif change == "pixels":  # where neither the index nor a size shows it
        shard = train / "shard-000000.tar"
        shard.write_bytes(shard.read_bytes().replace(b"IDAT", b"IDAt", 1))
    else:
        protocol = verification / "protocol.json"
        protocol.write_text(protocol.read_text() + " ")
    sets = f"evaluation.sets=[{task.parent / 'verification'}]"
    other = [f"data.train={train}", f"evaluation.sets=[{verification}]"]
    codes, output = start(task, tmp_path / "run", other, sets)
    assert_refused(codes, output, named)


def test_what_one_rank_lacks_ends_all_with_its_number(task: Path, tmp_path: Path) -> None:
    codes, output = start(task, tmp_path / "run", ["data.train=/nowhere"])
    assert_refused(codes, output, "rank 1: ", "/nowhere")


BACKBONE = """from torch import nn
def net(embedding_dim, channels, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, embedding_dim), nn.Tanh())
"""


def test_a_backbone_that_one_rank_computes_otherwise_is_refused(task: Path, tmp_path: Path) -> None:
    for name, code in (("one", BACKBONE), ("other", BACKBONE.replace("Tanh", "ReLU"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own_backbone.py").write_text(code)
    name = "model.name=own_backbone:net"
    codes, output = start(task, tmp_path / "run", [], name, cwd=tmp_path / "one", elsewhere=tmp_path / "other")
    assert_refused(codes, output, "the code of the backbone")


@pytest.mark.slow  # the command starts cold
def test_a_rank_with_patched_code_is_refused(task: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "partialfc", tmp_path / "patched" / "partialfc")
    with (tmp_path / "patched" / "partialfc" / "losses" / "arcface.py").open("a") as file:
        file.write("# looks the same\n")
    codes, output = start(task, tmp_path / "run", [], elsewhere=tmp_path / "patched", cold=True)
    assert_refused(codes, output, "the code of partialfc (")
