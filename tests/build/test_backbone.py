"""The backbone of a run: pretrained weights, own code, compiled, synchronised; names of tensors stay plain."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from partialfc import models
from partialfc.build.backbone import build_backbone, uses_sync_batchnorm, with_sync_batchnorm
from partialfc.build.engine import build_engine
from partialfc.build.optimizers import build_backbone_optimizer
from partialfc.checkpoint.config_diff import config_changes
from partialfc.config import Config, load_config, parse_config
from partialfc.engines.state import device_of_state
from partialfc.errors import ConfigError, MissingDependency
from partialfc.exchange import export as export_module
from partialfc.exchange.merge import merge
from partialfc.runtime.process import ProcessContext
from tests.harness.running import ENVIRONMENT, finish, lines, run
from tests.harness.tasks import write_task

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


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizers_are_fused_on_gpus(name: str) -> None:
    def build(device: str) -> torch.optim.Optimizer:
        settings = config(optim={"name": name, "lr": 0.3, "momentum": 0.8, "weight_decay": 0.1})
        return build_backbone_optimizer(settings, nn.Linear(3, 2), torch.device(device))

    on_cpu, on_gpu = build("cpu"), build("cuda")
    assert type(on_cpu) is {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    assert not on_cpu.defaults["fused"]
    assert on_gpu.defaults["fused"]
    assert (on_gpu.defaults["lr"], on_gpu.defaults["weight_decay"]) == (0.3, 0.1)
    if name == "sgd":
        assert on_gpu.defaults["momentum"] == 0.8
    # A checkpoint's state goes where the optimizer looks for it: a fused one counts its steps on the GPU.
    parameter = torch.empty(1, device="meta")
    assert device_of_state(on_cpu, parameter, "step").type == "cpu"
    assert device_of_state(on_gpu, parameter, "step").type == "meta"
    assert device_of_state(on_cpu, parameter, "momentum_buffer").type == "meta"


def test_what_may_change_in_a_run_that_goes_on() -> None:
    before = config(model={"name": "vit_t", "options": {"drop_path": 0.1}}).model_dump(mode="json")
    changed = {
        "name": "vit_s",
        "options": {"drop_path": 0.2},
        "pretrained": "w.pth",
        "activation_checkpointing": True,
        "channels_last": True,
    }
    now = config(model=changed, engine={"compile": True, "sync_batchnorm": False}).model_dump(mode="json")
    assert {change.key: change.severity for change in config_changes(before, now)} == {
        "model.name": "impossible",
        "model.options.drop_path": "needs --force",
        "model.pretrained": "harmless",
        "model.activation_checkpointing": "harmless",
        "model.channels_last": "harmless",
        "engine.compile": "harmless",
        "engine.sync_batchnorm": "needs --force",
    }
    names = {
        name: config(model={"name": name}).model_dump(mode="json") for name in ("r50", "iresnet50", "r100", "x.y:net")
    }
    for before_name, now_name, severity in (
        ("r50", "iresnet50", "harmless"),
        ("r50", "r100", "impossible"),
        ("r50", "x.y:net", "impossible"),
    ):
        (change,) = config_changes(names[before_name], names[now_name])
        assert change.severity == severity


# --- compiled ---------------------------------------------------------------------------------------------------------


def step(called: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """A training step's embeddings, the same random numbers each time; gradients are left on the parameters."""
    torch.manual_seed(3)
    embeddings = called(images)
    (embeddings * torch.linspace(-1, 1, 8)).sum().backward()
    return embeddings.detach()


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
        found.append((step(engine.forward, images), dict(backbone.named_parameters()), backbone.state_dict()))
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
def test_a_compiled_run_on_two_ranks_has_the_same_losses(task: Path) -> None:
    model = yaml.safe_dump(TINY_VIT, default_flow_style=True, width=10_000).strip()
    found = []
    for compile_it in ("false", "true"):
        folder = task.parent / compile_it
        # Micro-batches: gradients are averaged after the last one only.
        changes = [f"model={model}", f"engine.compile={compile_it}", f"run.dir={folder}", "optim.accumulation=2"]
        done = run(task, 2, *changes, "optim.epochs=0.5")
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


@pytest.fixture
def task(tmp_path: Path) -> Path:
    tree = write_task(tmp_path)
    tree["evaluation"] = {"sets": []}
    tree["optim"]["epochs"] = 1
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The backbone of a run's newest checkpoint."""
    path = folder / "all.safetensors"
    path.unlink(missing_ok=True)
    merge(folder, path, only="backbone.")
    return {name.removeprefix("backbone."): value for name, value in load_file(path).items()}


def test_a_run_begins_with_pretrained_weights_and_goes_on_with_its_own(task: Path) -> None:
    torch.manual_seed(7)
    weights = models.build("glyph_net", 32, 1, 16).state_dict()
    path = task.parent / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in weights.items()}, path)
    still = [f"model.pretrained={path}", "optim.lr=0"]
    done = run(task, 2, *still)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"the backbone starts from {path}") == 1
    for name, value in stored(task.parent / "run").items():
        assert torch.equal(value, weights[name]), name

    path.write_bytes(b"")  # a run that goes on does not read it
    resumed = run(task, 0, *still, "optim.epochs=2", "--force")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("is not read: the run resumes from its own checkpoint") == 1
    assert "the backbone starts from" not in resumed.stdout

    fresh = run(task, 2, *still, f"run.dir={task.parent / 'other'}")
    assert fresh.returncode != 0
    assert fresh.stderr.count("weights.safetensors cannot be read") == 2, "on every rank"
    torch.save(models.build("glyph_net", 16, 1, 16).state_dict(), task.parent / "weights.pth")
    wrong = run(task, 0, f"model.pretrained={task.parent / 'weights.pth'}", f"run.dir={task.parent / 'other'}")
    assert wrong.returncode == 2
    assert "in this backbone; check model.embedding_dim" in wrong.stderr
    assert not (task.parent / "other").exists(), "nothing is written"


def test_parameters_that_nothing_uses_or_trains_are_named(task: Path, tmp_path: Path) -> None:
    folder = f"run.dir={tmp_path / 'run'}"
    unused = run(task, 2, "model.name=tests.harness.backbones:unused_first", folder)
    assert unused.returncode == 1
    assert "the forward pass does not use 1 trainable parameters" in unused.stderr
    assert "to average over ranks: first. Remove them, or freeze them" in unused.stderr
    assert run(task, 0, "model.name=tests.harness.backbones:unused_first", folder, "--force").returncode == 0
    frozen = run(task, 0, "model.name=tests.harness.backbones:frozen", f"run.dir={tmp_path / 'frozen'}")
    assert frozen.returncode == 2
    assert "backbones:frozen has no parameter to train" in frozen.stderr


def test_ranks_are_of_a_dry_run(task: Path) -> None:
    done = run(task, 0, "--ranks", "2")
    assert done.returncode == 2
    assert "--ranks belongs to --dry-run" in done.stderr


def test_own_code_trains_and_is_exported_only_when_it_is_named(task: Path) -> None:
    module = """
from torch import nn

def net(embedding_dim, channels, width=8):
    layers = nn.Conv2d(channels, width, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(9 * width, embedding_dim))
"""
    (task.parent / "my_nets.py").write_text(module)
    # As the installed command, whose folder and not the current one is first on the path.
    start = "import sys; sys.path[:] = [p for p in sys.path if p]; from partialfc.__main__ import main; main()"
    environment = ENVIRONMENT | {"PYTHONPATH": str(Path(export_module.__file__).parents[2])}

    def partialfc(*arguments: Any) -> subprocess.CompletedProcess[str]:
        return finish([sys.executable, "-c", start, *map(str, arguments)], env=environment, cwd=task.parent)

    done = partialfc("train", task, "model.name=my_nets:net", "model.options={width: 5}")
    assert done.returncode == 0, done.stderr
    assert lines(task.parent / "run", "train")
    assert stored(task.parent / "run")["4.weight"].shape == (32, 45)
    refused = partialfc("export", task.parent / "run")
    assert refused.returncode == 2
    assert "code that is not of this package; to let it run, pass --model my_nets:net" in refused.stderr
    exported = partialfc("export", task.parent / "run", "--model", "my_nets:net")
    assert exported.returncode == 0, exported.stderr
    session = onnxruntime.InferenceSession(task.parent / "run" / "export" / "backbone.onnx")
    assert session.run(None, {"images": np.zeros((4, 1, 16, 16), np.float32)})[0].shape == (4, 32)


def test_a_checkpoint_cannot_make_an_export_run_code(task: Path) -> None:
    marker = task.parent / "owned"
    tree = load_config(task).model_dump(mode="json")
    tree["model"] |= {"name": "os:system", "options": {"command": f"touch {marker}"}}
    from partialfc.checkpoint.writer import save_checkpoint

    manifest = {"step": 1, "samples": 1, "num_classes": 3, "config": tree}
    save_checkpoint(task.parent / "evil", {"backbone.x": torch.zeros(1)}, manifest)
    with pytest.raises(ConfigError, match="code that is not of this package"):
        export_module.export(task.parent / "evil", onnx=False)
    with pytest.raises(ConfigError, match="code that is not of this package"):
        export_module.export(task.parent / "evil", onnx=False, model="os:getcwd")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["vit_t", "mobilefacenet"])
def test_a_backbone_of_every_family_trains_on_two_ranks_and_is_exported(name: str, task: Path) -> None:
    model = TINY_VIT if name == "vit_t" else {"name": name, "embedding_dim": 8}
    settings = yaml.safe_dump(model | {"activation_checkpointing": True}, default_flow_style=True, width=10_000).strip()
    done = run(task, 2, f"model={settings}", "optim.lr=0.01", "optim.epochs=0.3")
    assert done.returncode == 0, done.stderr
    folder = task.parent / "run"
    exported = export_module.export(folder)
    assert exported.onnx_difference is not None
    assert exported.onnx_difference < 1e-4
    found = load_file(folder / "export" / "backbone.safetensors")
    assert found.keys() == models.build(name, 8, 1, 16, model.get("options")).state_dict().keys()
