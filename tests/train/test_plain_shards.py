"""Training on WebDataset shards as others write them, without conversion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from partialfc.data.class_table import class_names
from partialfc.data.dataset import TarDataset
from tests.harness.running import lines, partialfc, run


@pytest.fixture
def pattern(short_task: Path) -> str:
    """The training set of the task in three shards of webdataset's own writer, with names of classes as labels."""
    webdataset = pytest.importorskip("webdataset", reason="not installed: webdataset; pip install '.[dev]'")
    data = TarDataset(short_task.parent / "train")
    folder = short_task.parent / "plain"
    folder.mkdir()
    for shard in range(3):
        with webdataset.TarWriter(str(folder / f"train-{shard:06d}.tar")) as writer:
            for i in range(shard * 74, (shard + 1) * 74):
                writer.write({"__key__": data.key(i), "png": data.read(i), "cls": data.classes[data.labels[i]]["name"]})
    return f"{folder}/train-{{000000..000002}}.tar"


def test_two_ranks_train_on_a_pattern_and_resume_on_a_list(short_task: Path, pattern: str, tmp_path: Path) -> None:
    known = f"evaluation.sets=[{tmp_path / 'known'}]"  # whose classes are found by their names
    done = run(short_task, 2, f"data.train={pattern}", known)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("indexing") == 1, "by one rank, for both"
    records = lines(tmp_path / "run", "evaluation")
    assert records, "names of the closed set were found among the labels"
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    names = list(class_names(checkpoint / "classes.jsonl"))
    assert (len(names), names[:3]) == (37, ["class 0", "class 1", "class 10"])
    shards = json.dumps([str(path) for path in sorted((tmp_path / "plain").glob("*.tar"))])
    done = run(short_task, 0, f"data.train={shards}", known, "optim.epochs=2", "--force")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "another data set" not in done.stdout
    assert lines(tmp_path / "run", "train")[-1]["step"] == 24


def test_a_dry_run_knows_the_classes_of_a_pattern(short_task: Path, pattern: str) -> None:
    done = partialfc("train", short_task, f"data.train={pattern}", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "37 classes" in done.stdout
    done = partialfc("train", short_task, f"data.train={pattern.replace('2}', '3}')}", "--dry-run")
    assert (done.returncode, "train-000003.tar is missing" in done.stderr) == (2, True)
