"""Rows, their names and order, run ids and sweeps: the parts of W&B tracking that need no run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from partialfc.config import WandbConfig
from partialfc.errors import MissingDependency
from partialfc.tracking.wandb import rows as wandb_rows
from partialfc.tracking.wandb.run import require_wandb, run_id
from partialfc.tracking.wandb.sent import Sent, SentLog, UnsentLines
from tests.harness.wandb_runs import (
    environment,
)


def test_rows_have_names_that_w_and_b_takes_for_names() -> None:
    results = {
        "v1.2": {"tar_at_far": {"0.01": 0.9, "1e-05": 0.4, "0.00015": 0.5}, "genuine_pairs": 3},
        "known": {"accuracy": 0.8, "genuine_cosine": None},
    }
    found = wandb_rows.row({"kind": "evaluation", "time": 5.0, "step": 7, "results": results})
    assert found == {
        "_timestamp": 5.0,
        "evaluation/v1_2/tar_at_far/1e-2": 0.9,
        "evaluation/v1_2/tar_at_far/1e-5": 0.4,
        "evaluation/v1_2/tar_at_far/1_5e-4": 0.5,
        "evaluation/v1_2/genuine_pairs": 3,
        "evaluation/known/accuracy": 0.8,
    }
    highest = wandb_rows.best(found, {"best/known/accuracy": 0.85, "best/v1_2/tar_at_far/1e-2": 0.1})
    assert highest["best/known/accuracy"] == 0.85
    assert highest["best/v1_2/tar_at_far/1e-2"] == 0.9
    assert "best/v1_2/genuine_pairs" not in highest
    event = wandb_rows.row({"kind": "event", "time": 5.0, "event": "checkpoint", "step": 3, "path": "p"})
    assert event == {"_timestamp": 5.0, "event/checkpoint/step": 3, "event/checkpoint/path": "p"}


def test_lines_are_read_as_they_come_and_none_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "event", "event": "started"}\n{"kind": "train", "step": 1}\n{"kind": "tra')
    notes = SentLog(tmp_path / "sent.txt")
    reader = UnsentLines(path, notes.sent)

    def new() -> list[tuple[str, int | None]]:
        found = []
        for line in reader.read():
            notes.add(line)
            found.append((line["kind"], line.get("step")))
        return found

    assert new() == [("event", None), ("train", 1)]
    with path.open("a") as file:
        file.write('in", "step": 2}\nnonsense\n{"kind": "evaluation", "step": 2}\n')
    assert not reader.all_read()
    assert new() == [("train", 2), ("evaluation", 2)]
    assert new() == []
    assert reader.all_read()
    assert reader.sent == Sent(rows=4, train=2, evaluation=2, events=1)
    assert SentLog(tmp_path / "sent.txt").sent == reader.sent
    # The next attempt begins at step 1: it repeats step 2, and continues.
    path.write_text(
        '{"kind": "event", "event": "started"}\n{"kind": "train", "step": 1}\n{"kind": "event", "event": "started"}\n'
        '{"kind": "train", "step": 2}\n{"kind": "evaluation", "step": 2}\n{"kind": "train", "step": 3}\n'
    )
    (tmp_path / "another").write_bytes(path.read_bytes())
    (tmp_path / "another").replace(path)
    assert not reader.all_read()
    notes = SentLog(tmp_path / "sent.txt")
    reader = UnsentLines(path, notes.sent)
    assert new() == [("event", None), ("train", 3)]
    assert reader.sent.rows == 6
    # W&B's server turns out to have three rows: the others come again.
    with (tmp_path / "sent.txt").open("a") as file:
        file.write("6 tra")
    notes = SentLog(tmp_path / "sent.txt", rows=3)
    assert notes.sent == Sent(rows=3, train=2, events=1)
    reader = UnsentLines(path, notes.sent)
    assert new() == [("event", None), ("evaluation", 2), ("train", 3)]
    assert SentLog(tmp_path / "sent.txt").sent == reader.sent == Sent(rows=6, train=3, evaluation=2, events=2)
    assert SentLog(tmp_path / "lost.txt", rows=4).sent == Sent(rows=4), "rows are not numbered twice"


def test_in_a_sweep_the_agent_names_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = run_id(tmp_path)
    assert len(own) == 8
    assert run_id(tmp_path) == own
    monkeypatch.setenv("WANDB_RUN_ID", "trial7")
    assert run_id(tmp_path) == own, "a leftover variable of some other run"
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    (tmp_path / "wandb" / "sent.txt").write_text("0 train 7\n")
    assert run_id(tmp_path) == "trial7"
    assert not (tmp_path / "wandb" / "sent.txt").exists(), "another run has sent nothing yet"
    monkeypatch.delenv("WANDB_SWEEP_ID")
    assert run_id(tmp_path) == "trial7"
    assert run_id(tmp_path, anew=True) != "trial7"


def test_a_sweep_runs_commands_that_the_trainer_understands(tmp_path: Path) -> None:
    """Command that W&B's agent starts for a trial, with a stand-in for the trainer that reads the config."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    root = Path(__file__).parents[2]
    sweep = yaml.safe_load((root / "configs" / "sweep.yaml").read_text())
    chosen: dict[str, Any] = {
        "optim.lr": 1e-05,
        "optim.head_lr_factor": 50,
        "head.loss.margin": 0.30000000000000004,
        "head.sample_rate": 0.1,
        "evaluation.every": 250,
    }
    assert set(chosen) == set(sweep["parameters"])
    arguments = create_sweep_command_args({"args": {key: {"value": value} for key, value in chosen.items()}})
    words: list[str] = []
    for word in create_sweep_command(sweep["command"]):
        words += arguments["args_no_hyphens"] if word == "${args_no_hyphens}" else [word]
    assert not any("${" in word for word in words)
    trainer = tmp_path / "partialfc"
    trainer.write_text(
        f"#!{sys.executable}\n"
        "import sys; from partialfc.config import load_config, to_yaml\n"
        "assert sys.argv[1] == 'train'; print(to_yaml(load_config(sys.argv[2], sys.argv[3:])))\n"
    )
    trainer.chmod(0o755)
    env = environment(tmp_path, WANDB_RUN_ID="trial7", PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHONPATH=str(root))
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=root, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    tree = yaml.safe_load(done.stdout)
    assert tree["run"]["dir"] == "runs/sweep/trial7"
    assert tree["tracking"]["wandb"]["mode"] == "auto"
    for key, value in chosen.items():
        found: Any = tree
        for name in key.split("."):
            found = found[name]
        assert found == value, key
    results = {"unseen_font": {"tar_at_far": {"0.001": 0.7}}}
    line = {"kind": "evaluation", "step": 1, "time": 1.0, "results": results}
    assert sweep["metric"]["name"] in wandb_rows.best(wandb_rows.row(line), {}), (
        "the sweep asks for a value that there is"
    )


def test_a_run_with_w_and_b_needs_its_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # a folder called wandb, which is not the client
    require_wandb(WandbConfig())
    with pytest.raises(MissingDependency, match=r"pip install 'partialfc\[wandb\]'"):
        require_wandb(WandbConfig(mode="auto"))
