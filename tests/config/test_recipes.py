"""Every recipe in configs/ is valid, and can be built at the size that it is for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from partialfc.config import load_config
from partialfc.planning.dry_run import dry_run
from tests.harness.dry_runs import sizes_of

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path for path in CONFIGS.glob("*.yaml") if "num_classes" in path.read_text())


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
    assert sizes.pop("host checkpoint", 0) > 0 or not config.checkpoint.asynchronous, "in the memory of the host"
    assert total == pytest.approx(sum(sizes.values()), rel=0.02)
    assert total < 74 * 2**30, "room for libraries is needed, too"
    assert sizes["backbone activations"] > 2**28
    rows = -(-config.data.num_classes // ranks)  # type: ignore[operator]
    width = 2 if config.head.weight_dtype == "bfloat16" else 4
    assert sizes["head weights"] >= 0.98 * rows * config.model.embedding_dim * width
