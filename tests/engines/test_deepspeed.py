"""The backbone under DeepSpeed: the same training as under torch alone, at every ZeRO stage and precision."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from partialfc.checkpoint.folders import step_folders
from partialfc.exchange.export import export
from partialfc.exchange.merge import merge
from tests.harness.engine_runs import LINEAR, STAGES, TWELVE, curve, folder_of, of_ranks, train_all, zero
from tests.harness.running import command, finish, lines

pytest.importorskip("deepspeed", reason="not installed: DeepSpeed; pip install -c constraints.txt '.[deepspeed]'")

pytestmark = pytest.mark.timeout(900)  # a fixture is many runs

THIRTY = ["optim.epochs=2.5"]  # 30 steps


@pytest.fixture(scope="module")
def compared(task: Path) -> Path:
    """Runs of two ranks under both engines, named PRECISION-ENGINE-ACCUMULATION."""
    tuned = task.parent / "tuned.json"
    tuned.write_text(
        json.dumps(
            {
                "train_batch_size": "auto",
                "train_micro_batch_size_per_gpu": 10,
                "gradient_clipping": 1.0,
                "zero_optimization": {"stage": 2, "reduce_bucket_size": 500, "allgather_bucket_size": "auto"},
                "fp16": {"enabled": "auto", "hysteresis": 2},
                "optimizer": {"type": "SGD", "params": {"lr": "auto"}},
            }
        )
    )
    engines = {"ddp": [], **{f"zero{stage}": zero(stage) for stage in STAGES}}
    runs = {}
    for name, engine in engines.items():
        for parts in (1, 3):
            runs[f"fp32-{name}-{parts}"] = [*THIRTY, *engine, f"optim.accumulation={parts}"]
        runs[f"bf16-{name}-1"] = [*THIRTY, *engine, "engine.precision=bf16"]
    normalized = "model.name=tests.harness.backbones:normalized"
    for name, engine in (("ddp", []), ("zero1", zero(1)), ("zero3", zero(3))):
        runs[f"fp32-{name}-normalized"] = [*THIRTY, *engine, normalized]
        runs[f"bf16-{name}-normalized"] = [*THIRTY, *engine, normalized, "engine.precision=bf16"]
        runs[f"fp32-{name}-adamw"] = [*THIRTY, *engine, "optim.name=adamw", "optim.lr=2e-3", "optim.head_lr_factor=1"]
    runs["fp32-tuned-1"] = [*THIRTY, *zero(2, f"engine.deepspeed_config={tuned}")]
    train_all(task, 2, runs)
    return task


@pytest.mark.parametrize("name", [f"zero{stage}-{parts}" for stage in STAGES for parts in (1, 3)] + ["tuned-1"])
def test_in_fp32_the_curve_is_that_of_ddp(compared: Path, name: str) -> None:
    found, expected = f"fp32-{name}", f"fp32-ddp-{name[-1]}"
    assert len(curve(compared, expected)) == 30
    assert curve(compared, expected)[-1] < 0.7 * curve(compared, expected)[0], (
        "it must learn for the comparison to mean something"
    )
    for key in ("loss", "target_cosine"):
        assert curve(compared, found, key) == pytest.approx(curve(compared, expected, key), rel=1e-4, abs=1e-5), key
    assert curve(compared, found, "grad_norm") == pytest.approx(curve(compared, expected, "grad_norm"), rel=1e-3)


@pytest.mark.parametrize("kind", ["normalized", "adamw"])
@pytest.mark.parametrize("stage", [1, 3])
def test_batch_statistics_and_adam_are_those_of_ddp(compared: Path, stage: int, kind: str) -> None:
    found, expected = curve(compared, f"fp32-zero{stage}-{kind}"), curve(compared, f"fp32-ddp-{kind}")
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["ddp-1", *[f"zero{stage}-1" for stage in STAGES], "zero1-normalized"])
def test_in_bf16_the_curve_stays_within_its_precision(compared: Path, name: str) -> None:
    exact = curve(compared, f"fp32-ddp-{name.rpartition('-')[2]}")
    found = curve(compared, f"bf16-{name}")
    of_one_image = slice(11, None, 12)  # an epoch's last batch: the rounding of one image is no mean over many
    assert found[of_one_image] == pytest.approx(exact[of_one_image], rel=0.3)
    del found[of_one_image], exact[of_one_image]
    assert found == pytest.approx(exact, rel=0.03)
    assert found != pytest.approx(exact, rel=1e-5), "the arithmetic differs"


@pytest.mark.slow
def test_real_backbones_compilers_and_offloaded_weights_keep_to_the_curve_of_ddp(task: Path) -> None:
    offloaded = task.parent / "offloaded.json"
    offloaded.write_text(json.dumps({"zero_optimization": {"offload_param": {"device": "cpu"}}}))
    few = ["optim.epochs=0.5"]  # 6 steps
    recomputing = ["model.name=vit_t", "model.options={patch_size: 8}", "model.activation_checkpointing=true"]
    kinds = {
        "slow-glyph": ([*few, "model.name=glyph_net"], [zero(1), zero(2), zero(3)]),
        "slow-vit": ([*few, *recomputing], [zero(1), zero(3)]),
        "slow-offload": (few, [zero(3, "engine.offload=cpu", f"engine.deepspeed_config={offloaded}")]),
        "slow-compile": (few, [zero(0, "engine.compile=true"), zero(2, "engine.compile=true")]),
    }
    for name, (settings, engines) in kinds.items():
        runs = {f"{name}-{number}": [*settings, *engine] for number, engine in enumerate([[], *engines])}
        train_all(task, 2, runs)
        for run in runs:
            assert curve(task, run) == pytest.approx(curve(task, f"{name}-0"), rel=1e-4), run


def test_all_ranks_end_with_the_same_weights(compared: Path) -> None:
    names = [path.parent.name for path in compared.parent.glob("*/rank1.json")]
    assert "fp32-ddp-normalized" in names
    for name in names:
        first, second = of_ranks(compared, name)
        assert first == second, name


def test_a_run_begins_with_the_same_weights_and_an_optimizer_that_has_not_stepped(compared: Path) -> None:
    names = [path.parent.name for path in compared.parent.glob("[fb][pf]*-*-*/rank0.json")]  # fp32-…, bf16-…
    for kind in ("1", "3", "normalized", "adamw"):
        found = [of_ranks(compared, name)[0] for name in names if name.endswith(f"-{kind}")]
        assert len(found) >= 3
        assert len({run["first"] for run in found}) == 1, "whatever engine and precision, before anything is rounded"
        assert not any(run["stepped at first"] for run in found)


@pytest.mark.parametrize("stage", STAGES)
def test_the_exported_backbone_is_the_trained_one(compared: Path, tmp_path: Path, stage: int) -> None:
    def exported(run: str, out: str) -> dict[str, torch.Tensor]:
        folder = export(folder_of(compared, run), tmp_path / out, onnx=False, model=LINEAR).folder
        return load_file(folder / "backbone.safetensors")

    by_ddp = exported("fp32-ddp-1", "ddp")
    for precision in ("fp32", "bf16"):
        run = f"{precision}-zero{stage}-1"
        found = exported(run, precision)
        assert {name: value.dtype for name, value in found.items()} == dict.fromkeys(by_ddp, torch.float32)
        digest = hashlib.sha256()
        for name in in_order(by_ddp):
            digest.update(found[name].numpy().tobytes())
            if precision == "fp32":
                torch.testing.assert_close(found[name], by_ddp[name], rtol=1e-3, atol=1e-4)
        assert digest.hexdigest() == of_ranks(compared, run)[0]["whole"], "bit by bit"
        merge(
            step_folders(folder_of(compared, run) / "checkpoints")[-1], tmp_path / f"{precision}.st", only="backbone."
        )
        for name, value in load_file(tmp_path / f"{precision}.st").items():
            assert torch.equal(value, found[name.removeprefix("backbone.")]), name


def in_order(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Return the names in the module's order: by layer, weight before bias."""
    return sorted(tensors, key=lambda name: (int(name.split(".")[0]), name.split(".")[1] != "weight"))


def test_frozen_weights_stay_exact_even_if_used_rounded(task: Path, tmp_path: Path) -> None:
    from tests.harness.backbones import frozen_first

    name = "tests.harness.backbones:frozen_first"
    first = frozen_first(32, 1, 16).state_dict()
    torch.save(first, tmp_path / "first.pth")
    settings = [*TWELVE, f"model.name={name}", f"model.pretrained={tmp_path / 'first.pth'}", "engine.precision=bf16"]
    train_all(task, 2, {f"frozen-zero{stage}": [*settings, *zero(stage)] for stage in STAGES})
    for stage in STAGES:
        folder = export(folder_of(task, f"frozen-zero{stage}"), tmp_path / f"{stage}", onnx=False, model=name).folder
        found = load_file(folder / "backbone.safetensors")
        assert torch.equal(found["1.weight"], first["1.weight"]), stage
        assert not torch.equal(found["4.weight"], first["4.weight"]), stage


def test_a_single_process_trains_and_the_console_has_one_format(task: Path, tmp_path: Path) -> None:
    settings = [
        f"run.dir={tmp_path / 'run'}",
        *TWELVE,
        *zero(2),
        "evaluation.sets=[" + str(task.parent / "known") + "]",
    ]
    done = finish(command(task, 0, *settings), seconds=200, cold=True)  # its messages on import count, too
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines(tmp_path / "run", "evaluation")[-1]["results"]["known"]["accuracy"] > 0.1
    for noise in ("[INFO]", "[WARNING]", "[Rank 0]", "Warning:", "untested"):
        assert noise not in done.stdout + done.stderr, done.stdout + done.stderr
