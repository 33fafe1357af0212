"""Dry runs: the table, and refused configs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from partialfc import ConfigError
from partialfc.config import load_config
from partialfc.head.padded_rows import list_size
from partialfc.planning.dry_run import count_classes, dry_run
from tests.harness.dry_runs import sizes_of
from tests.harness.running import partialfc
from tests.harness.tasks import write_task


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
    with pytest.raises(ConfigError, match=r"data.train: /nowhere does not exist; set data.num_classes"):
        count_classes(lost)
    assert count_classes(load_config(config, ["data.train=/nowhere", "data.num_classes=5"])) == 5


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
def test_a_dry_run_refuses_configs_that_would_not_start(tmp_path: Path, settings: list[str], words: str) -> None:
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


def test_a_dry_run_counts_places_left_over_the_sums_of_micro_batches_and_the_copy_of_a_checkpoint(
    tmp_path: Path,
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(write_task(tmp_path)))

    def table(*more: str) -> dict[str, float]:
        named = ["data.train=/nowhere", "data.num_classes=200_000", "model.name=iresnet18", "evaluation.sets=[]"]
        return sizes_of(dry_run(load_config(config, [*named, *more]), 2))

    plain, twice = table("head.sample_rate=0.1"), table("head.sample_rate=0.1", "optim.accumulation=2")
    places = list_size(100_000, 0.1, 20)
    assert places is not None
    assert plain["head rows' gradient"] == pytest.approx(places.places * (32 * 4 + 16), rel=0.01)
    assert "head accumulation" not in plain
    assert twice["head accumulation"] == pytest.approx(2 * plain["head rows' gradient"], rel=0.01)
    whole = table("head.sample_rate=1", "optim.accumulation=2")
    assert whole["head accumulation"] == whole["head rows' gradient"]
    saved = ("backbone weights", "backbone optimizer", "head weights", "head optimizer (sgd)", "head centers")
    assert plain["host checkpoint"] == pytest.approx(sum(plain[name] for name in saved), rel=0.01)
    assert "host checkpoint" not in table("checkpoint.asynchronous=false")
