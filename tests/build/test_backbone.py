"""The backbone of a run: pretrained weights, own code, compiled, synchronised; names of tensors stay plain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from partialfc import models
from partialfc.build.backbone import build_backbone, uses_sync_batchnorm, with_sync_batchnorm
from partialfc.build.engine import build_engine
from partialfc.config import Config, parse_config
from partialfc.errors import ConfigError, MissingDependency
from partialfc.exchange import export as export_module
from partialfc.runtime.process import ProcessContext
from tests.harness.checkpoints import stored
from tests.harness.running import lines, run

TINY_VIT = {
    "name": "vit_t",
    "embedding_dim": 8,
    "options": {"width": 16, "depth": 1, "heads": 2, "patch_size": 8, "drop_path": 0.4, "mask_ratio": 0.3},
}


def config(**sections: Any) -> Config:
    return parse_config({"data": {"train": "x", "image_size": 16}, **sections})


def alone(device: str = "cpu") -> ProcessContext:
    return ProcessContext(0, 1, torch.device(device), None)


# --- placed -----------------------------------------------------------------------------------------------------------


def test_channels_last_is_for_gpus_or_on_request() -> None:
    def layout(device: str, **model: Any) -> bool:
        backbone = build_backbone(config(model={"name": "iresnet18", **model}), alone(device))
        return backbone.get_submodule("layer2.0.conv1").weight.is_contiguous(memory_format=torch.channels_last)

    assert not layout("cpu")
    assert layout("cpu", channels_last=True)
    assert not layout("cpu", channels_last=False)


def test_synchronised_batch_normalisation_is_for_several_gpus() -> None:
    assert uses_sync_batchnorm("auto", "cuda", 2)
    assert not uses_sync_batchnorm("auto", "cuda", 1)
    assert not uses_sync_batchnorm("auto", "cpu", 2)
    assert not uses_sync_batchnorm(False, "cuda", 2)
    assert uses_sync_batchnorm(True, "cuda", 2)
    with pytest.raises(
        ConfigError, match=r"engine.sync_batchnorm: .*GPUs only, and this run is on cpu; set it to auto"
    ):
        build_backbone(config(engine={"sync_batchnorm": True}), alone())


def test_synchronising_keeps_the_tensors_and_their_names() -> None:
    before = models.build("iresnet18", 8, 1, 16)
    state, frozen = before.state_dict(), before.features.weight
    after = with_sync_batchnorm(before)
    assert {type(module).__name__ for module in after.modules() if "BatchNorm" in type(module).__name__} == {
        "SyncBatchNorm"
    }
    assert {name: value.data_ptr() for name, value in after.state_dict().items()} == {
        name: value.data_ptr() for name, value in state.items()
    }
    assert after.features.weight is frozen
    assert not frozen.requires_grad


# --- compiled ---------------------------------------------------------------------------------------------------------


def step(called: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """A training step's embeddings, the same random numbers each time; gradients are left on the parameters."""
    torch.manual_seed(3)
    embeddings = called(images)
    (embeddings * torch.linspace(-1, 1, 8)).sum().backward()
    return embeddings.detach()


@pytest.mark.slow
def test_a_compiled_backbone_is_the_same_random_numbers_included() -> None:
    images = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for compile_it in (False, True):
        settings = config(model=TINY_VIT | {"activation_checkpointing": True}, engine={"compile": compile_it})
        torch.manual_seed(0)
        backbone = build_backbone(settings, alone())
        names = list(backbone.state_dict())
        engine = build_engine(backbone, settings, alone())
        assert (backbone._compiled_call_impl is not None) == compile_it
        embeddings = step(partial(engine.forward, images_of_all_ranks=len(images)), images)
        found.append((embeddings, dict(backbone.named_parameters()), backbone.state_dict()))
        assert list(backbone.state_dict()) == names, "checkpoints and exports see plain names"
        assert int(backbone.get_buffer("feature.1.num_batches_tracked")) == 1
    (plain, parameters, state), (compiled, compiled_parameters, compiled_state) = found
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    largest = max(float(value.grad.abs().max()) for value in parameters.values())
    for name, value in parameters.items():
        difference = (compiled_parameters[name].grad - value.grad).abs().max()
        assert float(difference) <= 1e-4 * largest, name
    for name, value in state.items():
        torch.testing.assert_close(compiled_state[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_run_on_two_ranks_has_the_same_losses(short_task: Path) -> None:
    model = yaml.safe_dump(TINY_VIT, default_flow_style=True, width=10_000).strip()
    found = []
    for compile_it in ("false", "true"):
        folder = short_task.parent / compile_it
        # Micro-batches: gradients are averaged after the last one only.
        changes = [f"model={model}", f"engine.compile={compile_it}", f"run.dir={folder}", "optim.accumulation=2"]
        done = run(short_task, 2, *changes, "optim.epochs=0.5")
        assert done.returncode == 0, done.stderr
        found.append([line["loss"] for line in lines(folder, "train")])
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert stored(folder).keys() == models.build("vit_t", 8, 1, 16, TINY_VIT["options"]).state_dict().keys()


def test_a_missing_compiler_is_said_before_the_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(engine={"compile": True})
    backbone = build_backbone(settings, alone())
    monkeypatch.setenv("CXX", "a-compiler-that-there-is-not")
    with pytest.raises(MissingDependency, match=r"engine.compile needs a C\+\+ compiler on a CPU, and a-compiler"):
        build_engine(backbone, settings, alone())


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_t", "mobilefacenet"])
def test_a_backbone_of_every_family_trains_on_two_ranks_and_is_exported(name: str, short_task: Path) -> None:
    model = TINY_VIT if name == "vit_t" else {"name": name, "embedding_dim": 8}
    settings = yaml.safe_dump(model | {"activation_checkpointing": True}, default_flow_style=True, width=10_000).strip()
    done = run(short_task, 2, f"model={settings}", "optim.lr=0.01", "optim.epochs=0.3", "optim.warmup=0.3")
    assert done.returncode == 0, done.stderr
    folder = short_task.parent / "run"
    exported = export_module.export(folder)
    assert exported.onnx_difference is not None
    assert exported.onnx_difference < 1e-4
    found = load_file(folder / "export" / "backbone.safetensors")
    assert found.keys() == models.build(name, 8, 1, 16, model.get("options")).state_dict().keys()
