"""W&B switched off by its environment variable, under ``tracking.wandb.mode=auto``."""

from __future__ import annotations

from pathlib import Path

from tests.harness.wandb_runs import online, partialfc, train
from tests.harness.wandb_server import Server


def test_a_run_that_wandb_mode_disables_writes_and_sends_nothing_and_says_so_once(
    task: Path, tmp_path: Path, server: Server
) -> None:
    disabled = {**online(server), "WANDB_MODE": "disabled"}  # although there is a key
    quick = ["optim.epochs=1", "evaluation.every=0", "evaluation.sets=[]"]
    done = train(task, tmp_path, "tracking.wandb.mode=auto", *quick, **disabled)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "W&B" in line]
    assert [line[21:] for line in said] == ["W&B: disabled by WANDB_MODE"]
    exported = partialfc(tmp_path, "export", str(tmp_path / "run"), "--no-onnx", **disabled)
    assert exported.returncode == 0, exported.stdout + exported.stderr
    assert "W&B" not in exported.stdout + exported.stderr
    assert not list(tmp_path.rglob("*wandb*")), "neither in the run folder nor at home"
    assert server.requests == 0
