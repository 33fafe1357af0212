"""Backbones of the user's own code: trained by name, exported only when it is named again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from partialfc.config import load_config
from partialfc.errors import ConfigError
from partialfc.exchange import export as export_module
from tests.harness.checkpoints import stored
from tests.harness.running import ENVIRONMENT, finish, lines


def test_own_code_trains_and_is_exported_only_when_it_is_named(short_task: Path) -> None:
    module = """
from torch import nn

def net(embedding_dim, channels, width=8):
    layers = nn.Conv2d(channels, width, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(9 * width, embedding_dim))
"""
    (short_task.parent / "my_nets.py").write_text(module)
    # As the installed command, whose folder and not the current one is first on the path.
    start = "import sys; sys.path[:] = [p for p in sys.path if p]; from partialfc.__main__ import main; main()"
    environment = ENVIRONMENT | {"PYTHONPATH": str(Path(export_module.__file__).parents[2])}

    def partialfc(*arguments: Any) -> subprocess.CompletedProcess[str]:
        return finish([sys.executable, "-c", start, *map(str, arguments)], env=environment, cwd=short_task.parent)

    done = partialfc("train", short_task, "model.name=my_nets:net", "model.options={width: 5}")
    assert done.returncode == 0, done.stderr
    assert lines(short_task.parent / "run", "train")
    assert stored(short_task.parent / "run")["4.weight"].shape == (32, 45)
    refused = partialfc("export", short_task.parent / "run")
    assert refused.returncode == 2
    assert "code from outside this package; to let it run, pass --model my_nets:net" in refused.stderr
    exported = partialfc("export", short_task.parent / "run", "--model", "my_nets:net")
    assert exported.returncode == 0, exported.stderr
    session = onnxruntime.InferenceSession(short_task.parent / "run" / "export" / "backbone.onnx")
    assert session.run(None, {"images": np.zeros((4, 1, 16, 16), np.float32)})[0].shape == (4, 32)


def test_a_checkpoint_cannot_make_an_export_run_code(short_task: Path) -> None:
    marker = short_task.parent / "owned"
    tree = load_config(short_task).model_dump(mode="json")
    tree["model"] |= {"name": "os:system", "options": {"command": f"touch {marker}"}}
    from partialfc.checkpoint.writer import save_checkpoint

    manifest = {"step": 1, "samples": 1, "num_classes": 3, "config": tree}
    save_checkpoint(short_task.parent / "evil", {"backbone.x": torch.zeros(1)}, manifest)
    with pytest.raises(ConfigError, match="code from outside this package"):
        export_module.export(short_task.parent / "evil", onnx=False)
    with pytest.raises(ConfigError, match="code from outside this package"):
        export_module.export(short_task.parent / "evil", onnx=False, model="os:getcwd")
    assert not marker.exists()
