"""The configuration tree: every key documented, mistakes explained, values round-trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel

from partialfc import RowAdagrad, RowAdamW, RowSGD, losses
from partialfc.build.head import build_head
from partialfc.build.optimizers import build_head_optimizer
from partialfc.config import Config, build_loss, build_sample_rate, load_config, parse_config, to_yaml
from partialfc.errors import ConfigError
from tests.harness.running import partialfc
from tests.harness.tasks import write_task

MINIMAL: dict[str, Any] = {"data": {"train": "some/folder"}}


def test_every_key_has_a_line_of_documentation_and_all_but_the_data_have_defaults() -> None:
    def walk(model: type[BaseModel], path: str) -> None:
        for name, field in model.model_fields.items():
            assert field.description, f"{path}{name}"
            if path + name not in ("data", "data.train"):
                assert not field.is_required(), f"{path}{name}"
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            for kind in kinds:
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    walk(kind, f"{path}{name}.")

    walk(Config, "")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optm": {}}, "optm: unknown name 'optm'; did you mean 'optim'?"),
        ({"optim": {"learning_rate": 1}}, "optim.learning_rate: unknown name 'learning_rate'"),
        ({"optim": {"warmpu": 1}}, "did you mean 'warmup'?"),
        ({"optim": {"lr": -1}}, "optim.lr: .*greater than or equal to 0, got -1"),
        ({"optim": {"lr": "fast"}}, "optim.lr: .*valid number.*got 'fast'"),
        ({"optim": {"unsampled_rows": "lazy"}}, "optim.unsampled_rows: .*'frozen' or 'decayed', got 'lazy'"),
        ({"optim": {"unsampled_rows": "decayed", "head": "adamw"}}, "decayed needs the head's optimizer to be sgd"),
        (
            {"head": {"sample_rate_schedule": {"rates": [0.1, 2.0]}}},
            r"must lie in \(0, 1\], got 2.0",
        ),
        ({"head": {"sample_rate_schedule": {"epochs": [1, 2]}}}, "linear takes two rates and two epochs, the first 0"),
        ({"head": {"sample_rate_schedule": {"schedule": "steps", "epochs": [0, 0]}}}, "they begin at 0 and rise"),
        ({"head": {"sample_rate": 0}}, "head.sample_rate: .*greater than 0, got 0"),
        ({"head": {"center_loss": {"lambda": 1}}}, "head.center_loss.lambda: unknown name"),
        ({"head": {"loss": {"name": "arcfaec"}}}, "head.loss.name: .*did you mean 'arcface'?"),
        ({"head": {"loss": {"name": "arcface", "marign": 0.3}}}, "head.loss.marign: .*did you mean 'margin'?"),
        ({"head": {"loss": {"name": "arcface", "margin": 9}}}, r"head.loss \(arcface\): margin must lie in"),
        ({"head": {"loss": {"name": "arcface", "margin": "x"}}}, "head.loss.margin: expected a number, got 'x'"),
        ({"head": {"loss": {"name": "arcface", "scale": True}}}, "head.loss.scale: expected a number, got True"),
        ({"model": {"name": "glyphnet"}}, "model.name: .*did you mean 'glyph_net'?"),
        ({"data": {}}, "data.train: field required"),
        ({"data": {"train": "x", "channels": 2}}, "data.channels: .*1 or 3, got 2"),
        ({"data": {"train": "x", "global_batch_size": 0}}, "data.global_batch_size: .*got 0"),
    ],
)
def test_mistakes_are_explained(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config({**MINIMAL, **change})


def test_overrides_replace_values_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: {train: a, workers: 3}\noptim: {lr: 0.5}\n")
    config = load_config(file, ["optim.lr=2e-1", "head.loss.name=cosface", "head.loss.margin=0.2", "run.dir=x y"])
    assert (config.optim.lr, config.data.workers, str(config.run.dir)) == (0.2, 3, "x y")
    loss = build_loss(config.head.loss)
    assert isinstance(loss, losses.CosFace)
    assert loss.margin == 0.2
    assert build_loss(load_config(file, ["head.loss.scale=1e2"]).head.loss).scale == 100.0
    assert load_config(file, ["head.center_loss={weight: 0.1}"]).head.center_loss is not None
    for wrong in ("optim.lr", "=3", "optim.lr=[1"):
        with pytest.raises(ConfigError, match=r"section.key=value|not valid YAML"):
            load_config(file, [wrong])


def test_a_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config = parse_config({**MINIMAL, "head": {"loss": {"name": "combined", "m1": 1.1}, "center_loss": {}}})
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(file) == config


def test_unreadable_files_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config"):
        load_config(tmp_path / "none.yaml")
    for number, text in enumerate(("a: [", "- 1\n", "\x00")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError):
            load_config(file)


def test_shipped_configs_are_valid() -> None:
    files = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
    assert files
    for file in files:
        if file.name != "sweep.yaml":  # W&B's; its own test is in test_wandb.py
            load_config(file)


NESTED = {"focal": {"gamma": 1}, "label_smoothing": {"smoothing": 0.2}, "subcenter": {"sub_centers": 2}}


@pytest.mark.parametrize("name", losses.BY_NAME)
def test_every_loss_can_be_named_in_a_config(name: str, tmp_path: Path) -> None:
    tree: dict[str, Any] = {"name": name}
    if name in NESTED:
        tree |= {**NESTED[name], "loss": {"name": "cosface", "scale": "3e1", "margin": 0.1}}
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({**MINIMAL, "head": {"loss": tree}}))
    config = load_config(file)
    loss = build_loss(config.head.loss)
    assert type(loss) is losses.BY_NAME[name]
    if name in NESTED:
        assert (loss.base.scale, loss.base.margin) == (30.0, 0.1)
    file.write_text(to_yaml(config))
    assert repr(build_loss(load_config(file).head.loss)) == repr(loss), "the resolved config describes the same loss"
    head = build_head(config, 20)
    assert head.loss.needs == loss.needs


def test_parameters_of_losses_keep_their_types(tmp_path: Path) -> None:
    def build(**tree: Any) -> losses.Loss:
        return build_loss(parse_config({**MINIMAL, "head": {"loss": tree}}).head.loss)

    assert build(name="uce", bias=None).initial_bias is None
    assert build(name="uce", bias=3).initial_bias == 3.0
    assert build(name="elastic_arcface", plus=True).plus is True
    assert build(name="a_softmax", margin=3).margin == 3
    assert build(name="arcface", margin_gradient="straight_through").margin_gradient == "straight_through"
    nested = build(name="focal", loss={"name": "subcenter", "loss": {"name": "curricularface"}, "sub_centers": 2})
    assert nested.sub_centers == 2
    assert nested.needs == {"target_cosine_first"}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"name": "focal"}, "head.loss.loss: focal wraps another loss: give one"),
        ({"name": "focal", "loss": "arcface"}, r"head.loss.loss: expected a loss such as \{name: arcface"),
        ({"name": "focal", "loss": {"name": "arcfac"}}, "head.loss.loss.name: .*did you mean 'arcface'"),
        ({"name": "focal", "loss": {"name": "arcface", "m": 1}}, "head.loss.loss.m: unknown name 'm'"),
        ({"name": "focal", "loss": {"name": "uce"}}, r"head.loss \(focal\): .*UCE has no p_y"),
        ({"name": "subcenter_arcface", "sub_centers": 0}, r"in \[1, 256\], got 0"),
        ({"name": "subcenter_arcface", "sub_centers": 1.5}, "whole number in .* got 1.5"),
        ({"name": "elastic_arcface", "plus": "yes please"}, "head.loss.plus: expected true or false"),
        ({"name": "arcface", "margin_gradient": 1}, "head.loss.margin_gradient: expected a string, got 1"),
        ({"name": "arcface", "margin_gradient": "none"}, "margin_gradient must be one of"),
        ({"name": "arcface", "margin": None}, "head.loss.margin: expected a number, got None"),
    ],
)
def test_mistakes_in_losses_are_explained(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config({**MINIMAL, "head": {"loss": tree}})


def test_the_heads_optimizer_is_the_one_named() -> None:
    def build(**optim: Any) -> Any:
        config = parse_config({**MINIMAL, "optim": {"lr": 0.3, **optim}, "head": {"loss": {"name": "uce"}}})
        return build_head_optimizer(config, build_head(config, 20))

    assert type(build()) is RowSGD
    decayed = build(unsampled_rows="decayed", head_state_dtype="bfloat16", momentum=0.8)
    assert decayed.param_groups[0] | {"unsampled_rows": "decayed", "momentum": 0.8} == decayed.param_groups[0]
    assert decayed.param_groups[0]["state_dtype"] is torch.bfloat16
    assert type(build(name="adamw")) is RowAdamW
    assert type(build(name="adamw", head="sgd")) is RowSGD
    adagrad = build(head="adagrad", weight_decay=0.1, head_lr_factor=4)
    assert type(adagrad) is RowAdagrad
    rows, of_loss = adagrad.param_groups
    assert (rows["weight_decay"], rows["lr_factor"]) == (0.1, 4.0)
    assert (of_loss["weight_decay"], of_loss["lr_factor"]) == (0.0, 1.0), "a threshold is not a row"


def test_sample_rates_follow_their_schedule() -> None:
    def build(**tree: Any) -> Any:
        return build_sample_rate(parse_config({**MINIMAL, "head": tree}).head, steps_per_epoch=100)

    assert build(sample_rate=0.3) == 0.3
    linear = build(sample_rate_schedule={"rates": [0.2, 1.0], "epochs": [0, 2]})
    assert [linear(step) for step in (0, 100, 200, 500)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    steps = build(sample_rate_schedule={"schedule": "steps", "rates": [0.1, 0.5, 0.3], "epochs": [0, 1, 2.5]})
    assert [steps(step) for step in (0, 99, 100, 249, 250, 9999)] == [0.1, 0.1, 0.5, 0.5, 0.3, 0.3]
    assert (linear.largest, steps.largest) == (1.0, 0.5)
    head = build_head(parse_config({**MINIMAL, "head": {"weight_dtype": "bfloat16"}}), 20)
    assert head.weight.dtype is torch.bfloat16


def test_a_data_set_of_another_size_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(write_task(tmp_path)))
    done = partialfc("train", config, "data.num_classes=38")
    assert done.returncode == 2
    assert "data.num_classes: 38 expected, and" in done.stderr
    assert "has 37" in done.stderr


@pytest.mark.parametrize("key", ["data.global_batch_size", "optim.lr", "run.seed", "optim.clip"])
def test_a_truth_value_is_not_a_number(tmp_path: Path, key: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("data: {train: data}\n")
    with pytest.raises(ConfigError, match=rf"^{key}: expected a number, got True$"):
        load_config(config, [f"{key}=true"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", Path("a")),
        ("a-{000..123}.tar", Path("a-{000..123}.tar")),
        ("{a,b}.tar", Path("{a,b}.tar")),
        ("[a.tar, 'b-{0..1}.tar']", [Path("a.tar"), Path("b-{0..1}.tar")]),
        ("[2024]", [Path("2024")]),
        ("'[a]'", Path("[a]")),
    ],
)
def test_the_training_set_is_a_path_or_a_list(tmp_path: Path, text: str, expected: Path | list[Path]) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    config = load_config(tmp_path / "config.yaml", [f"data.train={text}"])
    assert config.data.train == expected
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("text", ["[]", "[[a]]", "{a: 1}", "null"])
def test_a_training_set_of_another_type_is_explained(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(f"data: {{train: {text}}}")
    with pytest.raises(ConfigError, match=r"^data\.train: expected a path, or a list of paths, got "):
        load_config(tmp_path / "config.yaml")
