"""Backbones by name: ours with options, anything that can be imported, timm's; mistakes are explained."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from partialfc import models
from partialfc.config import parse_config
from partialfc.errors import ConfigError, MissingDependency

FACTORIES = """
from torch import nn

class Flat(nn.Sequential):
    def __init__(self, embedding_dim, channels, image_size, bias=True):
        super().__init__(nn.Flatten(), nn.Linear(channels * image_size**2, embedding_dim, bias))

def only_dim(embedding_dim):
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*pooled, nn.LazyLinear(embedding_dim), nn.BatchNorm1d(embedding_dim))

def anything(**arguments):
    net = Flat(arguments.pop("embedding_dim"), arguments.pop("channels"), arguments.pop("image_size"))
    net.arguments = arguments
    return net

def with_checkpointing(embedding_dim, channels, image_size, activation_checkpointing=False):
    net = Flat(embedding_dim, channels, image_size)
    net.activation_checkpointing = activation_checkpointing
    return net

class Switched(Flat):
    def set_grad_checkpointing(self, enable=True):
        self.enabled = enable

class Unable(Flat):
    def set_grad_checkpointing(self, enable=True):
        assert not enable, "gradient checkpointing not supported"

class Whole:
    net = Flat

def needs_more(embedding_dim, channels, image_size, heads):
    return Flat(embedding_dim, channels, image_size)

def a_number(embedding_dim):
    return 3

def too_wide(embedding_dim, channels, image_size):
    return Flat(embedding_dim + 1, channels, image_size)

def for_other_images(embedding_dim, channels, image_size):
    return Flat(embedding_dim, channels, image_size + 1)

class Tuple(Flat):
    def forward(self, images):
        return super().forward(images), None

number = 3
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to start from that holds ``nets/mine.py``, and is not on the path, as for an installed command."""
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "mine.py").write_text(FACTORIES)
    (tmp_path / "nets" / "broken.py").write_text("import a_package_that_there_is_not")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    for name in [name for name in sys.modules if name.partition(".")[0] == "nets"]:
        monkeypatch.delitem(sys.modules, name)


def build(name: str, activation_checkpointing: bool = False, **options: Any) -> Any:
    return models.build(name, 24, 1, 10, options, activation_checkpointing)


def test_a_class_a_function_and_an_attribute_can_be_named() -> None:
    for name in ("nets.mine:Flat", "nets.mine:anything", "nets.mine:Whole.net", "nets.mine:only_dim"):
        backbone = build(name)
        assert backbone.training
        assert backbone(torch.randn(3, 1, 10, 10)).shape == (3, 24)


def test_a_factory_gets_the_sizes_that_it_takes_and_all_options() -> None:
    assert build("nets.mine:Flat", bias=False)[1].bias is None
    assert build("nets.mine:anything", depth=3).arguments == {"depth": 3}


def test_the_check_of_the_output_changes_nothing() -> None:
    backbone = build("nets.mine:only_dim")
    assert int(backbone[3].num_batches_tracked) == 0
    assert not any(isinstance(value, nn.UninitializedParameter) for value in backbone.parameters()), "sizes are known"


def test_activation_checkpointing_reaches_a_parameter_or_a_method() -> None:
    assert build("nets.mine:with_checkpointing", True).activation_checkpointing is True
    assert build("nets.mine:with_checkpointing").activation_checkpointing is False
    assert build("nets.mine:Switched", True).enabled is True


@pytest.mark.parametrize(
    ("name", "again", "options", "words"),
    [
        ("nets.mine:Flat", True, {}, "model.activation_checkpointing: nets.mine:Flat has neither a parameter"),
        ("nets.mine:Unable", True, {}, "does not support it: gradient checkpointing not supported"),
        ("nets.mine:Flat", False, {"bais": False}, r"model.options.bais: unknown name 'bais'; did you mean 'bias'\?"),
        ("nets.mine:a_number", False, {"x": 1}, "model.options.x: it takes no options"),
        ("nets.mine:Flat", False, {"channels": 3}, "model.options.channels: set data.channels instead"),
        ("nets.mine:needs_more", False, {}, "nets.mine:needs_more needs heads too"),
        ("nets.mine:a_number", False, {}, r"expected nets.mine:a_number to return a torch.nn.Module, got int"),
        ("nets.mine:number", False, {}, "nets.mine:number is a int; expected something to call"),
        ("nets.mine:Flatt", False, {}, r"in nets.mine: unknown name 'Flatt'; did you mean 'Flat'\?"),
        ("nets.mine:zzz", False, {}, r"in nets.mine: unknown name 'zzz'$"),
        ("nets.mien:Flat", False, {}, "nets.mien cannot be imported from .*: No module named 'nets.mien'"),
        ("nets.broken:Flat", False, {}, "nets.broken cannot be imported .*a_package_that_there_is_not"),
        ("nets.mine:", False, {}, "expected my.module:factory or timm:NAME, got 'nets.mine:'"),
        ("nets/mine.py:Flat", False, {}, "expected my.module:factory or timm:NAME"),
        ("timm:", False, {}, "expected my.module:factory or timm:NAME"),
        (
            "nets.mine:too_wide",
            False,
            {},
            r"expected embeddings \[2, 24\] \(model.embedding_dim\) of images \[2, 1, 10, 10\], got \[2, 25\] torch",
        ),
        ("nets.mine:Tuple", False, {}, r"expected embeddings \[2, 24\] .*, got tuple"),
        ("nets.mine:for_other_images", False, {}, r"does not take images \[2, 1, 10, 10\]: RuntimeError"),
    ],
)
def test_mistakes_in_imported_backbones_are_explained(
    name: str, again: bool, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        build(name, again, **options)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            {"name": "iresnet5"},
            r"model.name: unknown name 'iresnet5'; did you mean 'iresnet50'\?; your own are written",
        ),
        ({"name": "iresnet18", "options": {"drop_path": 0.1}}, "model.options.drop_path: unknown name 'drop_path'"),
        ({"name": "vit_t", "options": {"droppath": 0.1}}, r"did you mean 'drop_path'\?"),
        ({"name": "vit_t", "options": {"drop_path": "much"}}, "model.options.drop_path: expected a number, got 'much'"),
        ({"name": "vit_t", "options": {"image_size": 3}}, "model.options.image_size: set data.image_size instead"),
        ({"options": {"depth": 3}}, "model.options.depth: this backbone has no options"),
        ({"activation_checkpointing": True}, "glyph_net does not support it; iresnet18, .*mobilefacenet, .*vit_t.* do"),
        ({"channels_last": "yes"}, "model.channels_last: .*True, False or 'auto', got 'yes'"),
        ({"name": "my.module"}, "your own are written my.module:factory"),
    ],
)
def test_mistakes_are_found_when_the_config_is_read(model: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config({"data": {"train": "x"}, "model": model})


def test_reading_a_config_runs_no_foreign_code() -> None:
    assert (
        parse_config({"data": {"train": "x"}, "model": {"name": "nets.broken:Flat"}}).model.name == "nets.broken:Flat"
    )
    assert "nets" not in sys.modules


def test_options_of_ours_may_be_written_as_yaml_reads_them() -> None:
    backbone = models.build("vit_t", 8, 3, 18, {"depth": 2.0, "drop_path": "1e-1"})
    assert [block.drop_path for block in backbone.blocks] == [0, 0.1]


# --- timm: a stand-in that answers as it does -------------------------------------------------------------------------


class StandIn(types.ModuleType):
    """timm's functions that are used: a convolutional network, which takes no ``img_size``, and a transformer."""

    def __init__(self) -> None:
        super().__init__("timm")
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def list_models(self) -> list[str]:
        return ["resnet50", "vit_base"]

    def is_model(self, name: str) -> bool:
        return name.partition(".")[0] in self.list_models()

    def create_model(self, name: str, **arguments: Any) -> nn.Module:
        self.calls.append((name, dict(arguments)))
        known = {"num_classes", "in_chans", "drop_rate"} | ({"img_size"} if name.startswith("vit") else set())
        for argument in arguments:
            if argument not in known:
                raise TypeError(f"Net.__init__() got an unexpected keyword argument '{argument}'")
        pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(arguments["in_chans"], arguments["num_classes"])
        net: Any = nn.Sequential(*pooled)
        net.set_grad_checkpointing = lambda enable: setattr(net, "enabled", enable)
        return net


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    found = StandIn()
    monkeypatch.setitem(sys.modules, "timm", found)
    return found


def test_timm_models_get_their_sizes_by_timms_names(timm: StandIn) -> None:
    backbone = build("timm:vit_base.tag", True, drop_rate=0.1)
    assert backbone(torch.randn(3, 1, 10, 10)).shape == (3, 24)
    assert backbone.enabled is True
    sizes = {"num_classes": 24, "in_chans": 1}
    assert timm.calls == [("vit_base.tag", {"img_size": 10, **sizes, "drop_rate": 0.1})]
    timm.calls.clear()
    build("timm:resnet50", drop_rate=0.1)
    assert timm.calls[-1] == ("resnet50", {**sizes, "drop_rate": 0.1}), "without img_size, which it does not take"


def test_mistakes_with_timm_are_explained(timm: StandIn) -> None:
    with pytest.raises(ConfigError, match=r"model.name: timm: unknown name 'resnet5'; did you mean 'resnet50'\?"):
        build("timm:resnet5")
    with pytest.raises(ConfigError, match=r"model.options: timm:vit_base: .*unexpected keyword argument 'depht'"):
        build("timm:vit_base", depht=3)


def test_missing_timm_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependency, match=r"needs timm: pip install 'partialfc\[timm\]'"):
        build("timm:resnet50")
