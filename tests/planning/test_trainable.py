"""What a dry run counts and refuses of backbones that train in part, and of budgets that cost speed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from partialfc.config import Config, load_config
from partialfc.data.dataset import read_index
from partialfc.errors import ConfigError, DataError
from partialfc.planning.dry_run import dry_run
from partialfc.planning.memory import backbone_memory, slow_budget
from tests.harness.dry_runs import sizes_of
from tests.harness.tasks import write_task

BACKBONES = "model.name=tests.harness.backbones:"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    (folder / "config.yaml").write_text(yaml.safe_dump(write_task(folder)))
    return folder / "config.yaml"


def test_frozen_parts_have_no_gradients_and_no_optimizer_state(config_file: Path) -> None:
    lines = dry_run(load_config(config_file, [f"{BACKBONES}frozen_first", "model.embedding_dim=512"]), 1)
    # 16² · 43 weights are frozen; 43 biases, a norm of 43 and a layer to 512 dimensions are not.
    frozen, trained = 16**2 * 43, 43 + 2 * 43 + 43 * 512 + 512
    sizes = sizes_of(lines)
    assert sizes["backbone weights"] == pytest.approx(4 * (frozen + trained), rel=1e-3)
    assert sizes["backbone gradients"] == pytest.approx(4 * trained, rel=1e-3)
    assert sizes["backbone optimizer"] == pytest.approx(4 * trained, rel=1e-3)
    assert lines[1].endswith("0.0 M parameters, 33% of them frozen")


def test_memory_of_frozen_parts_under_zero() -> None:
    parts = backbone_memory(1000, "adamw", trainable=400, precision="bf16", zero_stage=2, world_size=4)
    assert parts == {"weights": 2000, "gradients": 200, "optimizer": 1200}


@pytest.mark.parametrize(
    ("backbone", "ranks", "words"),
    [
        ("frozen", 1, "backbones:frozen has no trainable parameter: all are frozen"),
        ("unused_first", 2, "does not use 1 trainable parameters, .*: first. Remove them"),
    ],
)
def test_a_backbone_that_cannot_be_trained_is_refused(config_file: Path, backbone: str, ranks: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dry_run(load_config(config_file, [BACKBONES + backbone]), ranks)


def test_a_parameter_without_gradient_is_no_obstacle_to_one_rank(config_file: Path) -> None:
    assert dry_run(load_config(config_file, [f"{BACKBONES}unused_first"]), 1)
    assert dry_run(load_config(config_file, [f"{BACKBONES}tiny_first"]), 2), "used ones are none"


def test_a_budget_that_costs_speed_is_said(config_file: Path) -> None:
    def budget(batch: int, megabytes: float) -> Config:
        sizes = [f"data.global_batch_size={batch}", f"head.memory_budget_mb={megabytes}"]
        return load_config(config_file, sizes)

    assert slow_budget(budget(1024, 256), 100_000) == ""
    warning = slow_budget(budget(4096, 1), 100_000)
    assert warning.startswith("head.memory_budget_mb=1 holds the logits of about 31 classes at once; ")
    assert warning.endswith(": 9 or more")
    assert slow_budget(budget(4096, 9), 100_000) == "", "what it advises is enough"
    assert slow_budget(budget(4096, 1), 20) == "", "all of them at once"
    lines = dry_run(budget(4096, 1), 1)
    assert [line for line in lines if line.startswith("WARNING")] == [f"WARNING: {slow_budget(budget(4096, 1), 37)}"]


def test_a_file_is_no_data_set(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "train.rec").touch()
    with pytest.raises(DataError, match=r"is a file; expected a data set folder .*`partialfc data convert` makes"):
        read_index(tmp_path / "train.rec")
