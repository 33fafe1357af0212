"""Every recipe in configs/ is valid, and can be built at the size that it is for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from partialfc import ConfigError, models
from partialfc.config import load_config
from partialfc.planning.activation_memory import peak_activation_bytes
from partialfc.planning.dry_run import count_classes, dry_run
from partialfc.planning.memory import backbone_memory
from tests.harness.running import partialfc
from tests.harness.tasks import write_task

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path for path in CONFIGS.glob("*.yaml") if "num_classes" in path.read_text())


def in_bytes(text: str) -> float:
    number, unit = text.replace(",", "").split()
    return float(number) * {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]


def sizes_of(lines: list[str]) -> dict[str, float]:
    """The bytes of each line of a dry run's table, by ``where what``."""
    sizes, where = {}, ""
    for line in lines[1:]:
        match = re.match(r"(.*?)\s\s+([\d.,]+ (?:bytes|KiB|MiB|GiB))", line[12:] + "  ")
        if line.startswith("  ") and match:
            where = line[2:12].strip() or where
            sizes[f"{where} {match[1]}".strip()] = in_bytes(match[2])
    return sizes


def test_there_is_a_recipe_for_each_promise() -> None:
    assert {path.stem for path in RECIPES} == {
        "ms1mv3_r50",
        "glint360k_r100",
        "webface42m_r100_8gpus",
        "webface42m_r100_32gpus",
        "webface42m_vit_l",
        "classes_10m_8gpus",
        "classes_100m_64gpus",
        "extreme_softmax",
        "finetune_published",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_built_and_fits_a_gpu_of_80_gb(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    ranks = int(re.findall(rf"partialfc train configs/{path.name} --dry-run --ranks (\d+)", text)[0])
    config = load_config(path)
    lines = dry_run(config, ranks)
    assert f"{config.data.num_classes:,} classes over {ranks} ranks" in lines[0]
    sizes = sizes_of(lines)
    total = sizes.pop("total")
    assert total == pytest.approx(sum(sizes.values()), rel=0.02)
    assert total < 74 * 2**30, "room for libraries is needed, too"
    assert sizes["backbone activations"] > 2**28
    rows = -(-config.data.num_classes // ranks)  # type: ignore[operator]
    width = 2 if config.head.weight_dtype == "bfloat16" else 4
    assert sizes["head weights"] >= 0.98 * rows * config.model.embedding_dim * width


def test_the_command_prints_the_table_and_says_what_it_lacks(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(write_task(tmp_path)))
    done = partialfc("train", config, "--dry-run", "--ranks", 2)
    assert done.returncode == 0, done.stderr
    assert "glyph_net, 37 classes over 2 ranks" in done.stdout
    assert "19 classes" in done.stdout, "the first of two ranks"
    assert not (tmp_path / "run").exists(), "nothing is written"
    assert "not there yet" not in done.stdout
    later = dry_run(load_config(config, ["model.pretrained=/nowhere.pth"]), 1)
    assert later[-1] == "not there yet: model.pretrained=/nowhere.pth"
    lost = load_config(config, ["data.train=/nowhere"])
    with pytest.raises(ConfigError, match=r"data.train: /nowhere does not exist, and data.num_classes does not tell"):
        count_classes(lost)
    assert count_classes(load_config(config, ["data.train=/nowhere", "data.num_classes=5"])) == 5


def test_a_data_set_of_another_size_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(write_task(tmp_path)))
    done = partialfc("train", config, "data.num_classes=38")
    assert done.returncode == 2
    assert "data.num_classes: 38 expected, and" in done.stderr
    assert "has 37" in done.stderr


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2)])
def test_lasting_memory_of_a_backbone_follows_the_engine(precision: Any, width: int) -> None:
    plain = backbone_memory(1000, "adamw", precision=precision)
    assert plain == {"weights": 4000, "gradients": 4000, "optimizer": 8000}
    stages = [backbone_memory(1000, "adamw", precision=precision, zero_stage=stage, world_size=4) for stage in range(4)]
    master = 0 if width == 4 else 4000
    assert stages[0] == {"weights": 1000 * width, "gradients": 1000 * width, "optimizer": master + 8000}
    assert stages[1] == {"weights": 1000 * width, "gradients": 1000 * width, "optimizer": 3000}
    assert stages[2] == {"weights": 1000 * width, "gradients": 250 * width, "optimizer": 3000}
    assert stages[3] == {"weights": 250 * width, "gradients": 250 * width, "optimizer": 3000}


ZERO = ["engine.name=deepspeed", "engine.zero_stage=2"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.num_classes=99"], "data.num_classes: 99 expected, and .* has 37"),
        ([*ZERO, "engine.deepspeed_config=/nowhere.json"], "engine.deepspeed_config: cannot read /nowhere.json"),
        ([*ZERO, "engine.deepspeed_config={folder}/ds.json"], "train_batch_size is 7, but data.global_batch_size"),
        (["model.name=mobilefacenet", "data.global_batch_size=2"], "batch normalisation needs at least 2 images"),
        (
            ["model.name=tests.harness.backbones:guessing"],
            "backbones:guessing cannot be found without computing",
        ),
    ],
)
def test_a_dry_run_refuses_what_would_not_start(tmp_path: Path, settings: list[str], words: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(write_task(tmp_path)))
    (tmp_path / "ds.json").write_text('{"train_batch_size": 7}')
    with pytest.raises(ConfigError, match=words):
        dry_run(load_config(config, [setting.format(folder=tmp_path) for setting in settings]), 2)


def test_a_dry_run_follows_networks_that_look_at_values_when_they_are_built(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(write_task(tmp_path)))
    assert "backbone activations" in sizes_of(
        dry_run(load_config(config, ["model.name=tests.harness.backbones:looking"]), 2)
    )


def test_a_dry_run_knows_what_deepspeed_adds_and_what_lies_in_host_memory(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(write_task(tmp_path)))

    def table(*more: str) -> list[str]:
        return dry_run(load_config(config, ["model.name=iresnet18", *ZERO, *more]), 2)

    plain, offloaded = sizes_of(table()), sizes_of(table("engine.offload=cpu"))
    assert plain["backbone averaging"] == pytest.approx(plain["backbone weights"] / 8, rel=0.02)
    assert offloaded["total"] == pytest.approx(plain["total"] - plain["backbone optimizer"], rel=0.02)
    assert "in host memory" in "\n".join(table("engine.offload=cpu"))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_the_peak_under_autocast_is_nearly_the_same_with_real_numbers(weights: torch.dtype) -> None:
    peaks = []
    for fake in (True, False):
        backbone = models.build("vit_t", 64, 3, 27, {"depth": 2, "width": 64, "heads": 2}, True)
        peaks.append(peak_activation_bytes(backbone, (3, 3, 27, 27), weights, torch.bfloat16, fake=fake))
    assert peaks[0] == pytest.approx(peaks[1], rel=0.005), "copies of weights die a little sooner or later"


@pytest.mark.parametrize("again", [False, True])
def test_the_peak_activation_bytes_is_the_same_with_real_numbers(again: bool) -> None:
    peaks = []
    for fake in (True, False):
        backbone = (
            models.build("mobilefacenet", 64, 3, 32, None, False)
            if not again
            else models.build("vit_t", 64, 3, 27, {"depth": 2, "width": 64, "heads": 2}, True)
        )
        size = 27 if again else 32
        torch.manual_seed(0)
        peaks.append(peak_activation_bytes(backbone, (3, 3, size, size), fake=fake))
    assert peaks[0] == peaks[1] > 0
