"""Optimizer state, epoch and step of arcface_torch's files, imported with the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from partialfc.checkpoint.folders import latest_valid
from partialfc.config import load_config
from partialfc.errors import DataError
from partialfc.exchange.import_weights import import_weights
from partialfc.exchange.merge import merge
from partialfc.models import BY_NAME
from tests.harness.running import partialfc, run
from tests.harness.tasks import write_task

CLASSES, DIM, EPOCH_STEPS = 37, 8, 11  # 222 samples in batches of 20


def write_run(
    folder: Path, world_size: int = 3, kind: str = "sgd", epoch: int = 2, step: int = 2 * EPOCH_STEPS
) -> tuple[torch.nn.Module, torch.Tensor, list[torch.optim.Optimizer]]:
    """Train a little as arcface_torch does, one optimizer a rank for the backbone and its rows; write its files."""
    folder.mkdir()
    torch.manual_seed(5)
    backbone = BY_NAME["glyph_net"](DIM, 1, 16)
    rows = [torch.nn.Parameter(part) for part in torch.randn(CLASSES, DIM).tensor_split(world_size)]
    optimizers = []
    for rank, weight in enumerate(rows):
        groups = [{"params": backbone.parameters()}, {"params": [weight]}]
        optimizer: torch.optim.Optimizer
        if kind == "sgd":
            optimizer = torch.optim.SGD(groups, lr=1e-4, momentum=0.9, weight_decay=5e-4)
        else:
            optimizer = torch.optim.AdamW(groups, lr=1e-4)
        for _ in range(2):
            optimizer.zero_grad()
            (backbone(torch.randn(4, 1, 16, 16)) @ weight.T).square().mean().backward()
            optimizer.step()
        optimizers.append(optimizer)
        content = {
            "epoch": epoch,
            "global_step": step,
            "state_dict_backbone": backbone.state_dict(),
            "state_dict_softmax_fc": {"weight": weight.detach()},
            "state_optimizer": optimizer.state_dict(),
            "state_lr_scheduler": {"last_epoch": step, "base_lrs": [0.1, 0.1]},
        }
        torch.save(content, folder / f"checkpoint_gpu_{rank}.pt")
    return backbone, torch.cat([part.detach() for part in rows]), optimizers


def write_config(folder: Path, **optim: Any) -> Path:
    task = write_task(folder)
    task["data"] |= {"last_batch": "drop"}
    task["model"] = {"name": "glyph_net", "embedding_dim": DIM}
    task["head"] = {"loss": {"name": "arcface", "scale": 16, "margin": 0.1}}
    task["evaluation"] = {"sets": []}
    task["optim"] = {"epochs": 3, "lr": 0.01, "warmup": 0, **optim}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(task))
    return path


Tensors = dict[str, torch.Tensor]


def stored(config: Path) -> tuple[dict[str, Any], Tensors]:
    """Return the manifest and all tensors of a run's checkpoint."""
    found = latest_valid(load_config(config).run.dir / "checkpoints")
    assert found is not None
    merge(found[0], config.parent / "all.safetensors")
    return found[1], load_file(config.parent / "all.safetensors")


def imported(config: Path, files: Path) -> tuple[dict[str, Any], Tensors]:
    """Import backbone and head in this process."""
    import_weights(load_config(config), files / "checkpoint_gpu_0.pt", files)
    return stored(config)


def test_momentum_epoch_and_step_are_kept_and_the_run_goes_on_from_there(tmp_path: Path) -> None:
    backbone, _, optimizers = write_run(tmp_path / "old")
    config = write_config(tmp_path)
    words = ["--backbone", tmp_path / "old" / "checkpoint_gpu_0.pt", "--head", tmp_path / "old"]
    done = partialfc("import", "weights", config, *words, ranks=2)
    assert done.returncode == 0, done.stderr
    printed, (manifest, tensors) = done.stdout, stored(config)
    assert "kept: epoch 2, so that the run continues at step 22; the backbone's optimizer state; the head's" in printed
    assert "not kept" not in printed
    assert (manifest["step"], manifest["samples"]) == (22, 440)
    assert (manifest["loader"]["epoch"], manifest["loader"]["batch"]) == (2, 0)
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            expected = optimizers[0].state[parameter]["momentum_buffer"]
            assert torch.equal(tensors[f"backbone_optimizer.{name}.momentum_buffer"], expected), name
    heads = [optimizer.state[optimizer.param_groups[1]["params"][0]]["momentum_buffer"] for optimizer in optimizers]
    assert torch.equal(tensors["head.optimizer.weight.momentum_buffer"], torch.cat(heads))
    assert int(tensors["head.step"]) == 22
    trained = run(config, 0)
    assert trained.returncode == 0, trained.stderr
    assert "resuming from step 22" in trained.stdout
    assert "33/33" in trained.stdout


def test_moments_of_adamw_are_kept_with_the_steps_of_every_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone, _, optimizers = write_run(tmp_path / "old", kind="adamw")
    _, tensors = imported(write_config(tmp_path, name="adamw", lr=1e-4), tmp_path / "old")
    assert "the backbone's optimizer state; the head's optimizer state" in capsys.readouterr().out
    state = optimizers[0].state[dict(backbone.named_parameters())["embedding.weight"]]
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(tensors[f"backbone_optimizer.embedding.weight.{key}"], state[key])
    heads = [optimizer.state[optimizer.param_groups[1]["params"][0]] for optimizer in optimizers]
    assert torch.equal(tensors["head.optimizer.weight.exp_avg"], torch.cat([head["exp_avg"] for head in heads]))
    assert tensors["head.optimizer.weight.row_steps"].tolist() == [2] * CLASSES


def test_older_files_bring_the_heads_momentum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old").mkdir()
    parts = [torch.randn(CLASSES, DIM).tensor_split(4) for _ in range(2)]
    for rank in range(4):
        torch.save(parts[0][rank].clone(), tmp_path / "old" / f"rank_{rank}_softmax_weight.pt")
        torch.save(parts[1][rank].clone(), tmp_path / "old" / f"rank_{rank}_softmax_weight_mom.pt")
    config = write_config(tmp_path)
    import_weights(load_config(config), None, tmp_path / "old")
    assert "kept: the head's optimizer state" in capsys.readouterr().out
    manifest, tensors = stored(config)
    assert manifest["step"] == 0
    assert torch.equal(tensors["head.weight"], torch.cat(parts[0]))
    assert torch.equal(tensors["head.optimizer.weight.momentum_buffer"], torch.cat(parts[1]))


@pytest.mark.parametrize(
    ("written", "optim", "words"),
    [
        (
            {"step": 2 * 17},
            {},
            "not kept: epoch 2, step 34, since an epoch has 11 of its steps here: another batch size",
        ),
        ({}, {"epochs": 2}, "not kept: epoch 2, step 22, since optim.epochs=2 ends there"),
        ({"kind": "adamw"}, {}, "has no momentum_buffer of shape"),
        ({}, {"momentum": 0}, "the backbone's momentum: optim.momentum is 0; the head's optimizer state: optim.mom"),
        ({}, {"head": "adagrad"}, "adagrad takes none of another optimizer"),
    ],
)
def test_what_does_not_fit_is_left_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], written: Any, optim: Any, words: str
) -> None:
    write_run(tmp_path / "old", **written)
    manifest, _ = imported(write_config(tmp_path, **optim), tmp_path / "old")
    assert words in capsys.readouterr().out
    assert manifest["step"] == (0 if {"step", "epochs"} & {*written, *optim} else 22)


def test_micro_batches_are_the_steps_of_arcface_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "old", step=2 * 2 * EPOCH_STEPS)
    manifest, _ = imported(write_config(tmp_path, accumulation=2), tmp_path / "old")
    assert manifest["step"] == 22


def test_shards_of_two_epochs_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "old")
    write_run(tmp_path / "later", epoch=3, step=33)
    (tmp_path / "later" / "checkpoint_gpu_1.pt").rename(tmp_path / "old" / "checkpoint_gpu_1.pt")
    config = write_config(tmp_path)
    with pytest.raises(DataError, match=r"checkpoint_gpu_1\.pt is of epoch 3, step 33, and .*of epoch 2, step 22"):
        import_weights(load_config(config), None, tmp_path / "old")
    assert not (load_config(config).run.dir / "checkpoints").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.update(state_optimizer=[1]),
        lambda content: content["state_optimizer"].update(param_groups=[]),
        lambda content: content["state_optimizer"].update(param_groups=[{"params": "all"}, 3]),
        lambda content: content["state_optimizer"].update(state={"0": 1}),
        lambda content: content["state_optimizer"]["state"][0].update(momentum_buffer=torch.zeros(2).to_sparse()),
        lambda content: content.update(epoch=-1),
        lambda content: content.update(global_step="many"),
        lambda content: content.update(epoch=10**12, global_step=10**15),
    ],
)
def test_state_of_another_form_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any) -> None:
    write_run(tmp_path / "old", world_size=1)
    file = tmp_path / "old" / "checkpoint_gpu_0.pt"
    content = torch.load(file, weights_only=True)
    damage(content)
    torch.save(content, file)
    manifest, tensors = imported(write_config(tmp_path), tmp_path / "old")
    assert "not kept: " in capsys.readouterr().out or manifest["step"] == 0
    assert "backbone.embedding.weight" in tensors
