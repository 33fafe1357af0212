"""The backbone under DeepSpeed: the same training as under torch alone, at every ZeRO stage and precision."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from partialfc.checkpoint.config_diff import config_changes
from partialfc.checkpoint.folders import step_folders
from partialfc.checkpoint.manifest import read_manifest
from partialfc.config import load_config
from partialfc.engines.deepspeed_config import deepspeed_options, loss_scale
from partialfc.errors import ConfigError
from partialfc.exchange.export import export
from partialfc.exchange.import_weights import import_weights
from partialfc.exchange.merge import merge
from tests.harness.machine import no_fp16, no_fp16_under_deepspeed
from tests.harness.running import command, events, finish, lines
from tests.harness.tasks import write_task

pytest.importorskip("deepspeed", reason="not installed: DeepSpeed; pip install -c constraints.txt '.[deepspeed]'")

pytestmark = pytest.mark.timeout(900)  # a fixture is many runs

FAULTY_RUN = str(Path(__file__).parents[1] / "harness" / "faulty_run.py")
LINEAR = "tests.harness.backbones:linear"
STAGES = [0, 1, 2, 3]
SPLIT = [1, 2, 3]


def zero(stage: int, *more: str) -> list[str]:
    return ["engine.name=deepspeed", f"engine.zero_stage={stage}", *more]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    tree = write_task(folder)
    tree["model"]["name"] = LINEAR
    tree["evaluation"] = {}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    return config


def train_all(task: Path, ranks: int, runs: dict[str, list[str]], fault: list[Any] | None = None) -> None:
    """Train runs of these names and overrides. One that fails leaves its output: the tests that ask for it fail."""
    for name, overrides in runs.items():
        words = [sys.executable, FAULTY_RUN, str(task), *map(str, fault or ("nothing", 0, "1"))]
        done = finish([*words, f"run.dir={task.parent / name}", *overrides], ranks=ranks)
        if done.returncode:
            (task.parent / f"{name}.failed").write_text(done.stdout + done.stderr)


def folder_of(task: Path, name: str) -> Path:
    """The folder of a run that has come to its end."""
    failed = task.parent / f"{name}.failed"
    if failed.exists():
        pytest.fail(f"the run {name} has failed:\n{failed.read_text()}")
    return task.parent / name


def curve(task: Path, name: str, key: str = "loss") -> list[float]:
    return [line[key] for line in lines(folder_of(task, name), "train")]


def of_ranks(task: Path, name: str, ranks: int = 2) -> list[dict[str, Any]]:
    return [json.loads((folder_of(task, name) / f"rank{rank}.json").read_text()) for rank in range(ranks)]


# --- the same curves --------------------------------------------------------------------------------------------------

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
    assert curve(compared, expected)[-1] < 0.7 * curve(compared, expected)[0], "it must learn to mean something"
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
    assert found == pytest.approx(exact, rel=0.03)
    assert found != pytest.approx(exact, rel=1e-5), "it is another arithmetic"


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
    """The names as the module has them: by layer, weight before bias."""
    return sorted(tensors, key=lambda name: (int(name.split(".")[0]), name.split(".")[1] != "weight"))


# --- steps that are skipped -------------------------------------------------------------------------------------------

TWELVE = ["optim.epochs=1"]  # 12 steps
FAULTY = {
    "ddp": [],
    **{f"zero{stage}": zero(stage) for stage in STAGES},
    **{f"zero{stage}-offload": zero(stage, "engine.offload=cpu") for stage in SPLIT},
}


def no_fp16_for(engine: str) -> str | None:
    """Why an engine cannot train in fp16 here, or None."""
    return no_fp16_under_deepspeed() if "zero" in engine else no_fp16()


def skip_if(reason: str | None) -> None:
    if reason:
        pytest.skip(reason)


UNEVEN = {  # parameters that two ranks cannot share evenly, one that only one of them has, one that gets no gradient
    "odd": ["data.image_size=15"],
    "tiny": ["model.name=tests.harness.backbones:tiny_first"],
    "unused": ["model.name=tests.harness.backbones:unused_first"],
}


@pytest.fixture(scope="module")
def uneven(task: Path) -> Path:
    """Runs in which a shard of the head breaks step 4, named KIND-ENGINE."""
    engines = {"ddp": [], **{f"zero{stage}": zero(stage) for stage in SPLIT}, "offload": zero(3, "engine.offload=cpu")}
    runs = {
        f"{kind}-{name}": [*TWELVE, *engine, *settings]
        for kind, settings in UNEVEN.items()
        for name, engine in engines.items()
        if (kind, name) != ("unused", "ddp")  # which DDP refuses
    }
    train_all(task, 2, runs, ["row_gradient", 1, "4"])
    return task


@pytest.mark.parametrize("kind", UNEVEN)
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "offload"])
def test_a_skipped_step_leaves_nothing_in_any_corner_of_a_gradient(uneven: Path, kind: str, engine: str) -> None:
    found, expected = (curve(uneven, f"{kind}-{name}") for name in (engine, "zero1" if kind == "unused" else "ddp"))
    assert [step for step, loss in enumerate(found, 1) if loss is None] == [4]
    assert applied(found) == pytest.approx(applied(expected), rel=1e-4)
    assert found[-1] < found[0]


@pytest.fixture(scope="module")
def faulty(task: Path) -> Path:
    """Runs in which rank 1 breaks step 9, named FAULT-PRECISION-ENGINE."""
    for fault in ("gradient", "row_gradient"):
        runs = {}
        for name, engine in FAULTY.items():
            for precision in ("fp32",) if no_fp16_for(name) else ("fp32", "fp16"):
                runs[f"{fault}-{precision}-{name}"] = [*TWELVE, *engine, f"engine.precision={precision}"]
        normalized = ["model.name=tests.harness.backbones:normalized", *TWELVE]
        runs[f"{fault}-bf16-zero2"] = [*TWELVE, *zero(2), "engine.precision=bf16"]
        runs |= {f"{fault}-normalized-ddp": normalized, f"{fault}-normalized-zero2": [*normalized, *zero(2)]}
        train_all(task, 2, runs, [fault, 1, "9"])
    return task


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_of_one_rank_is_skipped_by_all_and_leaves_nothing(faulty: Path, name: str, precision: str) -> None:
    skip_if(no_fp16_for(name) if precision == "fp16" else None)
    whole = set()
    for fault, words in (("gradient", "backbone's gradient"), ("row_gradient", "gradient of the head's shard")):
        run = f"{fault}-{precision}-{name}"
        first, second = of_ranks(faulty, run)
        assert first == second, "weights, skipped steps and loss scale of both ranks"
        skipped = events(folder_of(faulty, run), "skipped_step")
        assert [line["step"] for line in skipped if line["step"] == 9] == [9], "once"
        (found,) = next(line["faults"] for line in skipped if line["step"] == 9)
        assert (found["rank"], words in found["what"]) == (1, True)
        assert first["skipped"] == len(skipped)
        if precision == "fp16":
            assert first["loss_scale"]["value"] == 2.0 ** (16 - len(skipped)), "halved once a skipped step"
            last = skipped[-1]["step"]
            assert first["loss_scale"]["good_steps"] == 12 - last
        else:
            assert len(skipped) == 1
        whole.add(first["whole"])
        assert [line["step"] for line in lines(folder_of(faulty, run), "train")] == list(range(1, 13))
    assert len(whole) == 1, "whoever breaks a step, what it leaves is the same: nothing"
    if precision == "fp32":
        found, expected = (applied(curve(faulty, f"gradient-fp32-{engine}")) for engine in (name, "ddp"))
        assert found == pytest.approx(expected, rel=1e-4)


def applied(losses: list[float]) -> list[float]:
    """Those of the steps that were applied; a skipped one has none."""
    return [loss for loss in losses if loss is not None]


def test_a_skipped_step_leaves_batch_statistics_alone(faulty: Path) -> None:
    for fault in ("gradient", "row_gradient"):
        found, expected = (curve(faulty, f"{fault}-normalized-{name}") for name in ("zero2", "ddp"))
        assert found[8] is None
        assert applied(found) == pytest.approx(applied(expected), rel=1e-4)
        first, second = of_ranks(faulty, f"{fault}-bf16-zero2")
        assert first == second
        assert first["skipped"] == 1


# --- going on ---------------------------------------------------------------------------------------------------------

TWENTY_FOUR = ["optim.epochs=2", "checkpoint.every=10", "checkpoint.keep_last=9"]
ADAMW = ["optim.name=adamw", "optim.lr=2e-3", "optim.head_lr_factor=1"]
WHOLE = {
    "whole-ddp": [],
    "whole-zero1": zero(1),
    "whole-zero2": zero(2, *ADAMW),
    "whole-zero3": zero(3),
    "whole-bf16-zero0": zero(0, "engine.precision=bf16"),
    "whole-bf16-zero2": zero(2, "engine.precision=bf16"),
    "whole-bf16-zero3": zero(3, "engine.precision=bf16", *ADAMW),
}
WHOLE_HALF = {"whole-fp16-ddp": ["engine.precision=fp16"], "whole-fp16-zero1": zero(1, "engine.precision=fp16")}


def cut(task: Path, name: str, of: str, after: int) -> None:
    """A run folder like that of another run, when it had come to the checkpoint of step ``after``."""
    failed = task.parent / f"{of}.failed"
    if failed.exists():
        shutil.copy(failed, task.parent / f"{name}.failed")
        return
    shutil.copytree(task.parent / of, task.parent / name)
    for path in step_folders(task.parent / name / "checkpoints"):
        if int(path.name[5:]) > after:
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def continued(task: Path) -> Path:
    half = {name: more for name, more in WHOLE_HALF.items() if not no_fp16_for(name)}
    train_all(task, 2, {name: [*TWENTY_FOUR, *more] for name, more in (WHOLE | half).items()})
    for ranks in (1, 3):
        for stage in SPLIT:
            cut(task, f"zero{stage}-on{ranks}", f"whole-zero{stage}", 10)
    cut(task, "chain", "whole-ddp", 10)
    again = {f"again-{name}": [*TWENTY_FOUR, *more] for name, more in (WHOLE | half).items() if name != "whole-ddp"}
    for name in again:
        cut(task, name, name.removeprefix("again-"), 10)
    if "whole-fp16-zero1" in half:
        cut(task, "switched-fp16", "whole-fp16-ddp", 10)
        again["switched-fp16"] = [*TWENTY_FOUR, *WHOLE_HALF["whole-fp16-zero1"]]
    train_all(task, 2, again)
    resumed = {stage: [*TWENTY_FOUR, *WHOLE[f"whole-zero{stage}"]] for stage in SPLIT}
    train_all(task, 0, {f"zero{stage}-on1": resumed[stage] for stage in SPLIT})
    train_all(task, 3, {f"zero{stage}-on3": resumed[stage] for stage in SPLIT} | {"chain": [*TWENTY_FOUR, *zero(3)]})
    cut(task, "chain-back", "chain", 20)
    train_all(task, 2, {"chain-back": TWENTY_FOUR})
    return task


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("stage", SPLIT)
def test_a_run_goes_on_at_another_world_size(continued: Path, stage: int, ranks: int) -> None:
    name = f"zero{stage}-on{ranks}"
    started = [line["step"] for line in events(folder_of(continued, name), "started")]
    assert started == [0, 10]
    assert [line["step"] for line in lines(folder_of(continued, name), "train")] == list(range(1, 25))
    assert curve(continued, name) == pytest.approx(curve(continued, f"whole-zero{stage}"), rel=1e-4)


def test_a_run_goes_on_under_another_engine_and_back(continued: Path) -> None:
    for name in ("chain", "chain-back"):
        assert curve(continued, name) == pytest.approx(curve(continued, "whole-ddp"), rel=1e-4), name
    assert [line["step"] for line in events(folder_of(continued, "chain-back"), "started")] == [0, 10, 20]


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "whole-ddp"])
def test_a_run_goes_on_as_if_nothing_had_happened(continued: Path, name: str) -> None:
    assert curve(continued, f"again-{name}") == pytest.approx(curve(continued, name), rel=1e-6)
    assert of_ranks(continued, f"again-{name}")[0]["whole"] == of_ranks(continued, name)[0]["whole"], "bit by bit"


@pytest.mark.parametrize("name", WHOLE_HALF)
def test_the_loss_scale_survives_a_restart(continued: Path, name: str) -> None:
    skip_if(no_fp16_for(name))
    again, whole = of_ranks(continued, f"again-{name}")[0], of_ranks(continued, name)[0]
    assert again == whole
    assert whole["loss_scale"]["value"] < 2.0**16, "it has fallen before the checkpoint"


def test_the_loss_scale_survives_a_change_of_engine(continued: Path) -> None:
    skip_if(no_fp16_under_deepspeed())
    folder = folder_of(continued, "switched-fp16")
    kept = read_manifest(folder / "checkpoints" / "step-00000010")["counts"]["engine"]["loss_scale"]
    assert kept["value"] < 2.0**16
    last = read_manifest(folder / "checkpoints" / "step-00000020")
    skipped = {line["step"] for line in events(folder, "skipped_step")}
    fallen = sum(10 < step <= 20 for step in skipped)
    assert last["counts"]["engine"]["loss_scale"]["value"] == kept["value"] / 2**fallen


def test_another_engine_is_harmless_and_another_precision_is_not() -> None:
    before = {"engine": {"name": "ddp", "zero_stage": 1, "offload": "none", "precision": "fp32"}}
    now = {"engine": {"name": "deepspeed", "zero_stage": 3, "offload": "cpu", "precision": "bf16"}}
    severities = {change.key: change.severity for change in config_changes(before, now)}
    assert severities.pop("engine.precision") == "needs --force"
    assert set(severities.values()) == {"harmless"}


def test_what_is_frozen_stays_as_it_was_also_where_it_is_used_rounded(task: Path, tmp_path: Path) -> None:
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


def test_imported_weights_start_a_run_of_any_engine(task: Path, tmp_path: Path) -> None:
    from tests.harness.backbones import linear

    backbone = linear(32, 1, 16)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    settings = [f"run.dir={task.parent / 'imported'}", *TWELVE, *zero(3), "optim.lr=0"]
    written = import_weights(load_config(task, settings), tmp_path / "backbone.pth", None)
    assert read_manifest(written)["config"]["engine"]["name"] == "deepspeed"
    train_all(task, 2, {"imported": settings[1:]})
    exported = export(folder_of(task, "imported"), tmp_path / "export", onnx=False, model=LINEAR).folder
    for name, value in load_file(exported / "backbone.safetensors").items():
        assert torch.equal(value, backbone.state_dict()[name]), name


# --- what a user sees -------------------------------------------------------------------------------------------------


def test_a_single_process_trains_and_the_console_has_one_format(task: Path, tmp_path: Path) -> None:
    settings = [
        f"run.dir={tmp_path / 'run'}",
        *TWELVE,
        *zero(2),
        "evaluation.sets=[" + str(task.parent / "known") + "]",
    ]
    done = finish(command(task, 0, *settings), seconds=200, cold=True)  # what it says as it is imported counts, too
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines(tmp_path / "run", "evaluation")[-1]["results"]["known"]["accuracy"] > 0.1
    for noise in ("[INFO]", "[WARNING]", "[Rank 0]", "Warning:", "untested"):
        assert noise not in done.stdout + done.stderr, done.stdout + done.stderr


CONTRADICTIONS = [
    ({"train_batch_size": 512}, "train_batch_size is 512, but data.global_batch_size is 20; write"),
    ({"train_micro_batch_size_per_gpu": 20}, "is 20, but .* and 2 ranks make it 10"),
    ({"gradient_accumulation_steps": 4}, "is 4, but optim.accumulation is 1"),
    ({"gradient_clipping": 0.0}, "is 0.0, but optim.clip is 1.0; write"),
    ({"bf16": {"enabled": True}}, "bf16.enabled is true, but engine.precision is fp32"),
    ({"zero_optimization": {"stage": 3}}, "stage is 3, but engine.zero_stage is 1; write"),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, 'is "cpu", but engine.offload is none'),
    ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "host memory only"),
    ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "host memory only"),
    ({"optimizer": {"type": "Lamb"}}, 'optimizer.type is "Lamb", but optim.name is sgd'),
    ({"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}, "optimizer.params.lr is 0.1, but optim.lr"),
    ({"scheduler": {"type": "WarmupLR"}}, 'scheduler.type is "WarmupLR", but optim.schedule'),
    ({"zero_optimization": {"reduce_buckets": 5}}, "did you mean 'reduce_bucket_size'"),
    ({"zero_optimization": {"round_robin_gradients": True}}, "unknown name 'round_robin_gradients'"),
    ({"zero_optimization": {"stage": "1"}}, 'is "1", but engine.zero_stage is 1; write "auto" there or remove it$'),
    ({"gradient_clipping": None}, "is null, but optim.clip is 1.0; write"),
    ({"steps_per_print": 0}, "steps_per_print: expected a number from 1, got 0"),
    ({"steps_per_print": "inf"}, 'expected a number from 1, got "inf"'),
    ({"tensor_parallel": {}}, "unknown name 'tensor_parallel'"),
    ({"fp16": {"enabled": "auto", "fp16_master_weights_and_grads": True}}, "unknown name"),
    ({"zero_optimization": 2}, "expected a section, got 2"),
    ([], "expected an object, got list"),
]


@pytest.mark.parametrize(("content", "words"), CONTRADICTIONS)
def test_a_file_that_contradicts_the_config_is_refused(task: Path, tmp_path: Path, content: Any, words: str) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(content))
    config = load_config(task, zero(1, f"engine.deepspeed_config={tmp_path / 'ds.json'}"))
    with pytest.raises(ConfigError, match=words) as error:
        deepspeed_options(config, 2, 10**9)
    assert "ds.json" in str(error.value)


def test_a_file_says_what_the_config_leaves_open(task: Path, tmp_path: Path) -> None:
    content = {
        "train_batch_size": 20,
        "gradient_clipping": "auto",
        "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 10, "loss_scale_window": 7, "hysteresis": 1},
        "zero_optimization": {
            "stage": "auto",
            "reduce_bucket_size": 1000,
            "overlap_comm": "auto",
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
        },
        "scheduler": {"type": "auto", "params": {"warmup_num_steps": "auto"}},
        "comms_logger": {"enabled": False},
    }
    (tmp_path / "ds.json").write_text(json.dumps(content))
    file = f"engine.deepspeed_config={tmp_path / 'ds.json'}"
    config = load_config(task, zero(2, file, "engine.precision=fp16", "engine.offload=cpu"))
    options = deepspeed_options(config, 2, 10**9)
    plain = deepspeed_options(load_config(task, zero(2)), 2, 5000)
    assert plain["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 625}, "a part of the backbone"
    offload = {"device": "cpu", "pin_memory": True}
    assert options["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000, "offload_optimizer": offload}
    assert options["comms_logger"] == {"enabled": False}
    assert options["fp16"] == {"enabled": True, "loss_scale": 1.0}, "the engine scales by itself"
    scale = loss_scale(config)
    assert (scale.value, scale.window, scale.least) == (1024.0, 7, 1.0)
    for text, words in (("{", "is not valid JSON"), (None, "cannot read")):
        (tmp_path / "ds.json").unlink(missing_ok=True)
        if text:
            (tmp_path / "ds.json").write_text(text)
        with pytest.raises(ConfigError, match=words):
            deepspeed_options(config, 2, 10**9)


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        ({"initial_scale_power": 5000}, "fp16.initial_scale_power: expected a number from 0 to 24, got 5000"),
        ({"initial_scale_power": None}, "got null"),
        ({"min_loss_scale": 0}, "fp16.min_loss_scale: expected a number from 5.96046e-08 to 65536, got 0"),
        ({"initial_scale_power": 4, "min_loss_scale": 64}, "to 16, got 64"),
        ({"loss_scale_window": 0}, "fp16.loss_scale_window: expected a whole number from 1, got 0"),
        ({"loss_scale_window": 1.5}, "expected a whole number from 1, got 1.5"),
        ({"loss_scale_window": float("inf")}, "expected a whole number from 1, got Infinity"),
    ],
)
def test_a_loss_scale_that_cannot_work_is_refused(task: Path, tmp_path: Path, scale: dict, words: str) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"fp16": scale}))
    with pytest.raises(ConfigError, match=words):
        loss_scale(load_config(task, zero(1, f"engine.deepspeed_config={tmp_path / 'ds.json'}")))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["engine.deepspeed_config=x.json"], "needs engine.name=deepspeed"),
        (["engine.offload=cpu"], "needs engine.name=deepspeed"),
        (zero(0, "engine.offload=cpu"), "zero_stage of 1 to 3"),
        (zero(3, "engine.compile=true"), "engine.compile does not go with engine.zero_stage=3"),
        (zero(4), "engine.zero_stage"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(task: Path, settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(task, settings)
