"""The configuration tree: every key documented, mistakes explained, values round-trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from partialfc import losses
from partialfc.config import Config, build_loss, load_config, parse_config, to_yaml
from partialfc.errors import ConfigError

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
        ({"optim": {"unsampled_rows": "decayed"}}, "optim.unsampled_rows: .*'frozen', got 'decayed'"),
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
    files = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))
    assert files
    for file in files:
        load_config(file)
