"""A user's DeepSpeed file: allowed settings, and contradictions with the config."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from partialfc.config import load_config
from partialfc.engines.deepspeed_config import deepspeed_options, loss_scale
from partialfc.errors import ConfigError
from tests.harness.engine_runs import zero
from tests.harness.running import finish

pytest.importorskip("deepspeed", reason="not installed: DeepSpeed; pip install -c constraints.txt '.[deepspeed]'")

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
    ({"optimizer": {"params": {"betas": [0.9, 0.99]}}}, "optimizer.params.betas: unknown name 'betas'"),
    ({"scheduler": {"params": {"warmup_num_steps": 5}}}, "scheduler.params: unknown name 'params'"),
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


def test_a_file_sets_options_that_the_config_lacks(task: Path, tmp_path: Path) -> None:
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
        "optimizer": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9, "betas": "auto"}},
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
    assert options["fp16"] == {"enabled": True, "loss_scale": 1.0}, "the engine scales the loss itself"
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
        (zero(3, "engine.compile=true"), "engine.compile is incompatible with engine.zero_stage=3"),
        (zero(4), "engine.zero_stage"),
    ],
)
def test_incompatible_settings_are_refused(task: Path, settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(task, settings)


def test_fp16_on_a_cpu_that_deepspeed_refuses_it_on_is_one_line(task: Path, tmp_path: Path) -> None:
    program = (
        "from tests.harness.machine import pretend_fp16; from partialfc.__main__ import main\n"
        "pretend_fp16(False); main()\n"
    )
    words = [*zero(1), "engine.precision=fp16", f"run.dir={tmp_path / 'run'}"]
    done = finish([sys.executable, "-c", program, "train", str(task), *words])
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines() == [
        "error: DeepSpeed refuses its configuration: Type fp16 is not supported on your device."
    ]
