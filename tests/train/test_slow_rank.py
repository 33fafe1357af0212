"""A rank that keeps the others waiting in every step is named, with its host."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from statistics import mode
from typing import Any

import pytest
from torch import nn

from partialfc.config import EngineConfig
from partialfc.train.slow_rank import SlowestRank, SlowRankRule, own_phases
from tests.harness.running import events, finish, lines, state

FAULTY = str(Path(__file__).parents[1] / "harness" / "faulty_run.py")


def run_with_slow_rank(task: Path, folder: Path, steps: str) -> str:
    settings = ["evaluation.every=0", "evaluation.sets=[]", "optim.epochs=1.5"]
    done = finish([sys.executable, FAULTY, str(task), "slow", "1", steps, f"run.dir={folder}", *settings], ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_rank_that_is_slow_in_every_step_is_named_with_its_host(task: Path, tmp_path: Path) -> None:
    output = run_with_slow_rank(task, tmp_path / "run", "1-")
    train = lines(tmp_path / "run", "train")
    # On a busy machine the other rank may be slower for a step, and rank 1 be named again after it.
    assert mode(line["slowest_rank"] for line in train) == 1
    assert f"WARNING: rank 1 on {socket.gethostname()} takes " in output
    named = {(event["rank"], event["host"]) for event in events(tmp_path / "run", "slow_rank")}
    assert named == {(1, socket.gethostname())}


def test_a_rank_that_was_slow_for_some_steps_is_not(task: Path, tmp_path: Path) -> None:
    run_with_slow_rank(task, tmp_path / "run", "3,4,5")
    assert 1 in [line["slowest_rank"] for line in lines(tmp_path / "run", "train")][2:5]
    assert not [event for event in events(tmp_path / "run", "slow_rank") if event["rank"] == 1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named_where_collectives_wait_for_it_for_ever(
    task: Path, tmp_path: Path, rank: int
) -> None:
    settings = ["evaluation.every=0", "evaluation.sets=[]", "optim.epochs=1.5", "run.timeout=2"]
    words = [sys.executable, FAULTY, str(task), "hang", str(rank), "4", f"run.dir={tmp_path / 'run'}", *settings]
    done = finish(words, ranks=2)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"rank {rank} hangs: still in forward of step 4" in state(tmp_path / "run")["reason"]
    assert done.stderr.count(f"error: rank {rank} hangs") == 2, "each rank has said so"


def line(step: int, rank: int, delay: float) -> dict[str, Any]:
    return {"step": step, "slowest_rank": rank, "slowest_rank_delay": delay, "seconds": {"data": 0.4, "head": 0.6}}


@pytest.mark.parametrize(
    ("delays", "every", "told"),
    [
        ([(1, 0.2)] * 14, 1, [11]),  # once, after ten more steps
        ([(1, 0.2)] * 3, 20, [40]),  # in the second line
        ([(1, 0.09)] * 30, 1, []),  # a tenth of a step costs nobody anything
        ([(1, 0.2), (0, 0.2)] * 10, 20, []),  # it is not the same one
        ([(1, 0.2)] * 11 + [(0, 0.0)] + [(1, 0.2)] * 11, 1, [11, 23]),  # it begins again
    ],
)
def test_slow_is_who_is_slowest_by_a_tenth_of_a_step_for_some_lines_and_steps(
    delays: list[tuple[int, float]], every: int, told: list[int]
) -> None:
    rule = SlowRankRule()
    seen = [line((number + 1) * every, *delay) for number, delay in enumerate(delays)]
    assert [some["step"] for some in seen if rule.is_slow(some)] == told


def test_the_delay_is_what_the_slowest_has_beyond_the_others() -> None:
    assert SlowestRank.among([0.5]) == SlowestRank(0, 0.0)
    assert SlowestRank.among([0.25, 1.0]) == SlowestRank(1, 0.75)
    assert SlowestRank.among([0.25, 9.0, 0.5, 0.5]) == SlowestRank(1, 8.5), "one other that is quick says nothing"


def test_phases_in_which_the_backbone_waits_for_other_ranks_tell_nothing() -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert own_phases(plain, EngineConfig()) == ("data", "forward", "update")
    assert own_phases(plain, EngineConfig(name="deepspeed", zero_stage=2)) == ("data", "forward", "update")
    assert own_phases(plain, EngineConfig(name="deepspeed", zero_stage=3)) == ("data",)
    assert own_phases(nn.SyncBatchNorm.convert_sync_batchnorm(plain), EngineConfig()) == ("data",)
