"""Data that no run can use is refused at the start, with code 2 and in one line, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.harness.data_sets import forget_digests, write_table
from tests.harness.running import lines, partialfc, run, state
from tests.harness.tasks import write_set


@pytest.fixture
def copy(task: Path, tmp_path: Path) -> Path:
    """A copy of the task, to be spoiled; its data have no digests, as those of other tools."""
    for name in ("train", "known", "verification"):
        shutil.copytree(task.parent / name, tmp_path / name)
        forget_digests(tmp_path / name)
    config = yaml.safe_load(task.read_text())
    config["run"]["dir"] = str(tmp_path / "run")
    config["data"]["train"] = str(tmp_path / "train")
    config["evaluation"]["sets"] = [str(tmp_path / "verification"), str(tmp_path / "known")]
    config["optim"] |= {"epochs": 0.2, "warmup": 0}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _reverse(table: Path) -> None:
    table.write_text("".join(reversed(table.read_text().splitlines(keepends=True))))


def _shorten(table: Path) -> None:
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))


def _rename(table: Path) -> None:
    table.write_text(table.read_text().replace('"class 5"', '"somebody"'))


@pytest.mark.parametrize(
    ("file", "spoil", "words"),
    [
        ("train/classes.jsonl", _reverse, "line 1 is not a class with 'id' 0"),
        ("train/classes.jsonl", _shorten, "expected 37 classes, one a line; it has only 36"),
        ("train/classes.jsonl", Path.unlink, "classes.jsonl cannot be read: No such file"),
        ("train/classes.jsonl", lambda table: table.write_text("id,name\n"), "line 1 is not JSON"),
        ("train/index.json", Path.unlink, "index.json is missing"),
        ("known/classes.jsonl", _rename, "1 of 37 classes are not in"),
        ("known/classes.jsonl", Path.unlink, "classes.jsonl cannot be read: No such file"),
        ("verification/protocol.json", lambda path: path.write_text('{"x": {}}'), "must be a list of designs"),
    ],
)
def test_a_run_refuses_data_that_it_cannot_use(
    copy: Path, file: str, spoil: Callable[[Path], object], words: str
) -> None:
    spoil(copy.parent / file)
    done = run(copy, 0)
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert "Traceback" not in done.stderr
    assert not (copy.parent / "run").exists(), "nothing is written for a run that cannot start"


def test_all_ranks_refuse_with_the_same_words(copy: Path) -> None:
    _shorten(copy.parent / "train" / "classes.jsonl")
    done = run(copy, 2)
    assert done.returncode != 0
    for rank in (0, 1):
        assert f"[rank {rank}] error: {copy.parent / 'train' / 'classes.jsonl'}: expected 37 classes" in done.stderr


def test_a_resumed_run_refuses_another_order_of_the_classes(copy: Path) -> None:
    assert run(copy, 0).returncode == 0
    names = [f"class {i}" for i in range(37)]
    write_table(copy.parent / "train" / "classes.jsonl", [names[1], names[0], *names[2:]])
    done = run(copy, 0, "optim.epochs=0.4", "evaluation.sets=[]", "--force")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "class 0 was 'class 0' when the checkpoint was written, and is 'class 1' now" in done.stderr


def test_a_closed_set_of_some_classes_in_another_order_is_scored_by_name(copy: Path) -> None:
    def accuracy(*more: str) -> float:
        done = run(copy, 0, f"run.dir={copy.parent / 'trained'}", "optim.epochs=3", *more)
        assert done.returncode == 0, done.stdout + done.stderr
        found: float = lines(copy.parent / "trained", "evaluation")[-1]["results"]["known"]["accuracy"]
        return found

    trained = accuracy(f"evaluation.sets=[{copy.parent / 'known'}]")
    assert trained > 0.2, "chance is 0.03"
    for first, count in ((0, 30), (7, 30)):
        folder = copy.parent / f"from{first}" / "some"
        write_set(folder, count, 2, seed=2, first_picture=first)
        done = partialfc("evaluate", copy.parent / "trained", "--set", folder)
        assert done.returncode == 0, done.stdout + done.stderr
        results = (copy.parent / "trained" / "evaluation").glob("step-*-some-*.json")
        written = max(results, key=lambda path: path.stat().st_mtime_ns)
        assert json.loads(written.read_text())["some"]["accuracy"] > 0.2, first
    write_set(copy.parent / "strange", 37, 2, seed=2, first_picture=1)
    refused = partialfc("evaluate", copy.parent / "trained", "--set", copy.parent / "strange")
    assert refused.returncode == 2
    assert "1 of 37 classes are not in" in refused.stderr
    assert "the first is class 36, 'class 37'" in refused.stderr


def test_a_name_that_a_figure_cannot_draw_ends_no_run(copy: Path) -> None:
    protocol = copy.parent / "verification" / "protocol.json"
    protocol.write_text(protocol.read_text().replace('"plain": {', '"$ ^ $": {'))
    folder = f"{copy.parent}/5$ or 6$"
    done = run(copy, 0, f"run.dir={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(Path(folder, "evaluation").glob("roc-*.png"))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_ends_a_run_in_one_line(copy: Path, workers: int) -> None:
    shard = copy.parent / "train" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    start = 0
    for _ in range(37 * 6):
        start = content.index(b"\x89PNG", start) + 8
        content[start - 8 : start] = bytes(8)
    shard.write_bytes(content)
    done = run(copy, 0, f"data.workers={workers}")
    assert done.returncode == 2, done.stdout + done.stderr
    reason = state(copy.parent / "run")["reason"]
    assert len(reason.splitlines()) == 1
    assert reason.startswith(f"{shard}: sample 'c")
    assert reason.endswith("cannot be decoded: not a PNG, JPEG or WebP image")
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == f"error: {reason}"
