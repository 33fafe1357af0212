"""Files of weights: of every wrapper, of other kinds, and of tensors that cannot be copied."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from partialfc.errors import ConfigError, DataError
from partialfc.models.weights import load_backbone, read_weights
from tests.harness.checkpoints import Hostile


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))


def loaded(path: Path, module: nn.Module | None = None) -> dict[str, torch.Tensor]:
    module = module or net()
    load_backbone(module, path)
    return module.state_dict()


@pytest.mark.parametrize("prefix", ["_orig_mod.module.", "module._orig_mod.", "_orig_mod.", "module.module."])
def test_names_lose_the_prefixes_of_all_wrappers(tmp_path: Path, prefix: str) -> None:
    state = net().state_dict()
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "w.pt")
    found = loaded(tmp_path / "w.pt")
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_a_name_of_the_backbone_itself_keeps_what_looks_like_a_prefix(tmp_path: Path) -> None:
    module = nn.ModuleDict({"module": nn.Linear(2, 2)})
    torch.save(module.state_dict(), tmp_path / "w.pt")
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    found = loaded(tmp_path / "w.pt", nn.ModuleDict({"module": nn.Linear(2, 2)}))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_tensor_with_and_without_a_prefix_is_refused(tmp_path: Path) -> None:
    state = net().state_dict()
    torch.save(state | {"module.0.bias": torch.zeros(4)}, tmp_path / "w.pt")
    with pytest.raises(DataError, match=r"holds 0\.bias twice"):
        loaded(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"\n <!DOCTYPE html><html>Sign in</html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n", "git lfs pull"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "unlike a file of torch.save or safetensors"),
        (b"PK\x03\x04" + bytes(40), "cannot be read"),
        (b"\x80\x02}q\x00", "cannot be read"),
        (b"\x80\x05\x95" + bytes(9), "cannot be read"),
        (struct.pack("<Q", 30) + b"{" + bytes(60), "cannot be read"),
    ],
)
def test_a_file_of_another_kind_gets_advice_that_fits(tmp_path: Path, content: bytes, words: str) -> None:
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(content)
        _refused(tmp_path / name, words)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
def test_code_in_a_file_is_named_and_not_run(tmp_path: Path) -> None:
    torch.save({"weight": Hostile(f"touch {tmp_path}/owned")}, tmp_path / "w.pt")
    _refused(tmp_path / "w.pt", "posix.system")
    torch.jit.script(net()).save(tmp_path / "script.pt")
    _refused(tmp_path / "script.pt", "TorchScript")
    assert not (tmp_path / "owned").exists()


def _refused(path: Path, words: str) -> None:
    with pytest.raises(DataError) as refused:
        read_weights(path)
    assert words in str(refused.value)
    assert "weights_only" not in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_the_first_bytes_and_not_the_name_tell_the_format(tmp_path: Path) -> None:
    state = net().state_dict()
    save_file(state, tmp_path / "renamed.pth")
    torch.save(state, tmp_path / "renamed.safetensors")
    for path in tmp_path.iterdir():
        found = loaded(path)
        assert all(torch.equal(found[name], value) for name, value in state.items())


def test_what_is_not_a_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.pt")
    for path, words in ((tmp_path / "fifo.pt", "regular"), (Path("/dev/zero"), "regular"), (tmp_path, "folder")):
        _refused(path, words)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda value: value.to_sparse(), "sparse"),
        (lambda value: value.to_sparse_csr(), "sparse"),
        (lambda value: value.to("meta"), "meta"),
        (lambda value: value.to(torch.complex64), "complex"),
        (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "quantized"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tensor_without_plain_values_is_refused(tmp_path: Path, make: Any, kind: str) -> None:
    torch.save({"0.weight": make(torch.eye(4))}, tmp_path / "w.pt")
    with pytest.raises(DataError, match=rf"0\.weight is a {kind} tensor; expected a dense one") as refused:
        read_weights(tmp_path / "w.pt")
    assert len(str(refused.value).splitlines()) == 1


def test_integers_are_no_weights(tmp_path: Path) -> None:
    state = net().state_dict()
    torch.save(state | {"0.weight": torch.ones(4, 6, dtype=torch.int8)}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"0\.weight is torch\.int8, and torch\.float32 in this backbone"):
        loaded(tmp_path / "w.pt")


class Headless(nn.Module):
    """A network of which a classifier was removed."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(6, 4), nn.Identity()


@pytest.mark.parametrize("head", ["fc", "classifier", "head", "heads.head", "head.fc", "last_linear", "classifier.1"])
def test_a_classifier_is_left_out_where_the_backbone_has_none(tmp_path: Path, head: str) -> None:
    weight = torch.randn(4, 6)
    state = {"body.weight": weight, "body.bias": torch.zeros(4)}
    classifier = {f"{head}.weight": torch.randn(1000, 4), f"{head}.bias": torch.randn(1000)}
    torch.save(state | classifier, tmp_path / "w.pt")
    module = Headless()
    assert load_backbone(module, tmp_path / "w.pt") == list(classifier)
    assert torch.equal(module.body.weight, weight)


@pytest.mark.parametrize(
    "more",
    [
        {"neck.weight": torch.zeros(1000, 4)},
        {"fc.weight": torch.zeros(1000, 4), "bn.weight": torch.zeros(4)},
        {"fc.bias": torch.zeros(1000)},
        {"fc.weight": torch.zeros(8, 4, 3, 3)},
        {"fc.0.weight": torch.zeros(1000, 4)},
    ],
)
def test_anything_else_that_the_backbone_lacks_is_refused(tmp_path: Path, more: dict[str, torch.Tensor]) -> None:
    torch.save(Headless().state_dict() | more, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=f"holds {next(iter(more))}.*, which this backbone does not have"):
        load_backbone(Headless(), tmp_path / "w.pt")


def test_no_part_of_an_embedding_layer_is_taken_for_a_classifier(tmp_path: Path) -> None:
    """A backbone with an ``fc`` of its own needs all of it."""
    module = nn.ModuleDict({"body": nn.Linear(6, 4), "fc": nn.Linear(4, 3, bias=False)})
    torch.save(module.state_dict() | {"fc.bias": torch.zeros(3)}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"holds fc\.bias, which this backbone does not have"):
        load_backbone(module, tmp_path / "w.pt")
