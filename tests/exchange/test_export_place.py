"""Exports: only of a backbone that fits, and only over files of an earlier export."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from partialfc.checkpoint.writer import save_checkpoint
from partialfc.config import parse_config
from partialfc.errors import ConfigError
from partialfc.exchange.export import Exported, export
from partialfc.tracking.metrics import read_metrics

NAME = "tests.harness.backbones:linear"
FILES = ["backbone.safetensors", "class_centers.npy", "classes.jsonl", "export.json"]


def of_width(width: int, bias: bool = True) -> Callable[..., nn.Module]:
    def factory(embedding_dim: int, channels: int, image_size: int) -> nn.Module:
        hidden = nn.Linear(channels * image_size**2, width, bias=bias)
        return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(width, embedding_dim))

    return factory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the checkpoint of a backbone with 64 hidden units."""
    config = parse_config(
        {
            "run": {"dir": str(tmp_path / "run")},
            "data": {"train": "data", "image_size": 8, "channels": 1},
            "model": {"name": NAME, "embedding_dim": 8},
        }
    )
    (tmp_path / "classes.jsonl").write_text("".join(f'{{"id": {n}, "name": "{n}"}}\n' for n in range(5)))
    backbone = of_width(64)(8, 1, 8).state_dict()
    tensors = {f"backbone.{name}": value for name, value in backbone.items()} | {"head.weight": torch.randn(5, 8)}
    manifest = {"step": 3, "samples": 21, "num_classes": 5, "config": config.model_dump(mode="json")}
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000003"
    save_checkpoint(checkpoint, tensors, manifest, (tmp_path / "classes.jsonl",))
    (tmp_path / "run" / "metrics.jsonl").touch()
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def width_64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.harness.backbones.linear", of_width(64))


def exported(run: Path, out: Path | None = None, centers: bool = True) -> Exported:
    return export(run, out, centers, onnx=False, model=NAME)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (of_width(96), r"backbone\.1\.weight has shape \[64, 64\] there and \[96, 64\] in this run; use the code"),
        (of_width(32), r"backbone\.1\.weight has shape \[64, 64\] there and \[32, 64\] in this run; use the code"),
        (of_width(64, bias=False), r"holds backbone\.1\.bias, which this run does not have; use the code"),
        (lambda **sizes: nn.Sequential(*of_width(64)(**sizes), nn.Linear(8, 8)), r"it lacks backbone\.4\.weight; use"),
    ],
)
def test_a_backbone_that_has_changed_is_not_exported(
    run: Path, monkeypatch: pytest.MonkeyPatch, factory: Callable[..., nn.Module], words: str
) -> None:
    assert exported(run).files == FILES
    shutil.rmtree(run / "export")
    monkeypatch.setattr("tests.harness.backbones.linear", factory)
    with pytest.raises(ConfigError, match=words) as refused:
        exported(run)
    assert len(str(refused.value).splitlines()) == 1
    assert not (run / "export").exists()


def test_an_export_replaces_its_own_files_and_no_others(run: Path) -> None:
    exported(run)
    out = run / "export"
    (out / "notes.txt").write_text("mine")
    (out / "plots").mkdir()
    (out / "backbone.onnx").write_text("of an earlier export")
    (out / "backbone.safetensors").write_text("old")
    assert exported(run, centers=False).files == ["backbone.safetensors", "classes.jsonl", "export.json"]
    assert sorted(path.name for path in out.iterdir()) == [
        "backbone.safetensors",
        "classes.jsonl",
        "export.json",
        "notes.txt",
        "plots",
    ]
    assert load_file(out / "backbone.safetensors")["1.weight"].shape == (64, 64)
    assert (out / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "export", "metrics.jsonl"]


@pytest.mark.parametrize("about", ['{"tool": "another"}', "[]", "not JSON", "[" * 100_000])
def test_the_export_of_another_tool_is_left_alone(run: Path, tmp_path: Path, about: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "export.json").write_text(about)
    (out / "backbone.onnx").write_text("theirs")
    with pytest.raises(ConfigError, match="holds something that is not an export"):
        exported(run, out)
    assert (out / "export.json").read_text() == about
    assert (out / "backbone.onnx").read_text() == "theirs"


def test_links_in_the_place_of_an_export_are_replaced_and_not_followed(run: Path, tmp_path: Path) -> None:
    out = run / "export"
    exported(run)
    (tmp_path / "precious").write_text("precious")
    for name in FILES[:3]:
        (out / name).unlink()
        (out / name).symlink_to(tmp_path / "precious")
    (out / "nearest.py").symlink_to(tmp_path / "new")
    exported(run)
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "new").exists()
    assert not any(path.is_symlink() for path in out.iterdir())
    assert np.load(out / "class_centers.npy").shape == (5, 8)


def test_a_folder_under_the_name_of_a_file_is_refused_before_anything_is_lost(run: Path) -> None:
    out = run / "export"
    exported(run)
    (out / "backbone.onnx").mkdir()
    kept = (out / "export.json").read_bytes()
    with pytest.raises(ConfigError, match=r"backbone\.onnx is a folder, not the file of an export"):
        exported(run)
    assert (out / "export.json").read_bytes() == kept


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_all_files_of_an_export_have_the_mode_of_a_new_file(run: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        exported(run)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (run / "export").iterdir()}
    assert modes == {0o666 & ~mask}


def test_a_link_in_place_of_the_metrics_does_not_keep_an_export_from_ending(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").write_text("precious")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(tmp_path / "precious")
    assert exported(run, tmp_path / "out").files == FILES
    assert (tmp_path / "precious").read_text() == "precious"
    assert "metrics.jsonl cannot be written (a symbolic link, not a file)" in capsys.readouterr().out
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").touch()
    exported(run, tmp_path / "out")
    assert [line["event"] for line in read_metrics(run / "metrics.jsonl")] == ["export"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("..", r"holds 1 run, such as .*run; expected the folder"),
        ("checkpoints", r"holds the checkpoints of the run .*run; expected"),
        ("missing", "does not exist; expected"),
        ("metrics.jsonl", "is a file; expected"),
        ("x" * 300, "cannot be read|does not exist"),
        ("empty", "is some other folder; expected"),
        ("data", "is a data set; expected"),
        ("export", "is an export; expected"),
        ("new", "is a run without checkpoints; expected"),
    ],
)
def test_a_path_that_is_no_run_is_described(run: Path, name: str, words: str) -> None:
    for folder, file in (("empty", "a.txt"), ("data", "index.json"), ("export", "export.json"), ("new", "state.json")):
        (run / folder).mkdir()
        (run / folder / file).write_text(json.dumps({}))
    with pytest.raises(ConfigError, match=words):
        exported(run / name)
