"""Runs that start from pretrained weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from partialfc import models
from tests.harness.checkpoints import stored
from tests.harness.running import run


def test_a_run_begins_with_pretrained_weights_and_resumes_with_its_own(short_task: Path) -> None:
    torch.manual_seed(7)
    weights = models.build("glyph_net", 32, 1, 16).state_dict()
    path = short_task.parent / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in weights.items()}, path)
    still = [f"model.pretrained={path}", "optim.lr=0"]
    done = run(short_task, 2, *still)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"the backbone starts from {path}") == 1
    for name, value in stored(short_task.parent / "run").items():
        assert torch.equal(value, weights[name]), name

    path.write_bytes(b"")  # a resumed run does not read it
    resumed = run(short_task, 0, *still, "optim.epochs=2", "--force")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("is not read: the run resumes from its own checkpoint") == 1
    assert "the backbone starts from" not in resumed.stdout

    fresh = run(short_task, 2, *still, f"run.dir={short_task.parent / 'other'}")
    assert fresh.returncode != 0
    assert fresh.stderr.count("weights.safetensors cannot be read") == 2, "on every rank"
    torch.save(models.build("glyph_net", 16, 1, 16).state_dict(), short_task.parent / "weights.pth")
    other = f"run.dir={short_task.parent / 'other'}"
    wrong = run(short_task, 0, f"model.pretrained={short_task.parent / 'weights.pth'}", other)
    assert wrong.returncode == 2
    assert "in this backbone; check model.embedding_dim" in wrong.stderr
    assert not (short_task.parent / "other").exists(), "nothing is written"
