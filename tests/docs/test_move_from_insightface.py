"""The page for users of InsightFace: its commands, run on files that InsightFace's tools wrote."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from partialfc.config import load_config
from partialfc.models import BY_NAME
from tests.harness.running import partialfc

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "move-from-insightface.md").read_text(encoding="utf-8")
FIXTURES = ROOT / "tests" / "fixtures" / "insightface"
CONFIG = """\
from easydict import EasyDict as edict
config = edict()
config.margin_list = (1.0, 0.5, 0.0)
config.network = "mbf"
config.output = None
config.embedding_size = 16
config.batch_size = 2
config.num_workers = 0
config.rec = "faces_emore"
config.num_classes = 12
config.num_epoch = 2
config.val_targets = ["lfw"]
"""


def commands() -> list[list[str]]:
    blocks = re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("partialfc ")]


def write_what_a_user_has(folder: Path) -> None:
    shutil.copytree(FIXTURES / "faces_a", folder / "faces_emore")
    shutil.copy(FIXTURES / "val_lfw_like.bin", folder / "faces_emore" / "lfw.bin")
    (folder / "arcface_torch" / "configs").mkdir(parents=True)
    (folder / "arcface_torch" / "configs" / "ms1mv3_r50.py").write_text(CONFIG)
    old = folder / "work_dirs" / "ms1mv3_r50"
    old.mkdir(parents=True)
    backbone = BY_NAME["mobilefacenet"](16, 3, 112)
    for rank, rows in enumerate(torch.randn(12, 16).tensor_split(8)):
        weight = torch.nn.Parameter(rows.clone())
        optimizer = torch.optim.SGD([{"params": backbone.parameters()}, {"params": [weight]}], lr=0.1, momentum=0.9)
        for parameter in (*backbone.parameters(), weight):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        content = {
            "epoch": 1,
            "global_step": 3,  # 60 images in batches of 16
            "state_dict_backbone": backbone.state_dict(),
            "state_dict_softmax_fc": {"weight": weight.detach()},
            "state_optimizer": optimizer.state_dict(),
        }
        torch.save(content, old / f"checkpoint_gpu_{rank}.pt")


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_command_of_the_page_runs_on_files_of_insightface(tmp_path: Path, all_of_them: bool) -> None:
    write_what_a_user_has(tmp_path)
    ran, outputs = 0, {}
    for words in commands():
        if not all_of_them and words[1:3] not in (["data", "convert"], ["import", "config"]):
            continue
        done = partialfc(*words[1:], cwd=tmp_path)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        outputs[" ".join(words[1:3])] = done.stdout
        ran += 1
    assert ran == (9 if all_of_them else 3)
    tree = yaml.safe_load((tmp_path / "ms1mv3_r50.yaml").read_text())
    assert (tree["data"]["train"], tree["evaluation"]["sets"]) == ("data/faces_emore", ["data/lfw"])
    if all_of_them:
        assert "kept: epoch 1, so that the run continues at step 3" in outputs["import weights"]
        assert "lfw: accuracy" in outputs["evaluate runs/ms1mv3_r50"]
        assert (tmp_path / "runs" / "ms1mv3_r50" / "export" / "backbone.onnx").exists()


def test_the_pages_table_names_keys_that_an_import_writes(tmp_path: Path) -> None:
    write_what_a_user_has(tmp_path)
    done = partialfc(*commands()[2][1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = load_config(tmp_path / "ms1mv3_r50.yaml").model_dump()
    named = re.findall(r"`(\w+)\.(\w+)", PAGE.split("| arcface_torch | here |")[1].split("## Train")[0])
    assert len(named) > 15
    for section, key in named:
        assert key in config[section], f"{section}.{key}"
