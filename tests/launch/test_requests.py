"""Requests to Slurm: what sbatch would refuse later, or would let replace the job script's own options."""

from __future__ import annotations

from pathlib import Path

import pytest

from partialfc.errors import ConfigError
from partialfc.launch.slurm import Request, job_script


def script(**request: object) -> str:
    return job_script(Request(**{"nodes": 1, "time": "60", **request}), "face", Path("run"), Path("c.yaml"), [])  # type: ignore[arg-type]


@pytest.mark.parametrize("gpus", ["8", "a100:4", "a100_80gb:8", "v100:2,k80:1"])
def test_gpus_are_a_number_or_kinds_with_numbers(gpus: str) -> None:
    assert f"#SBATCH --gpus-per-node={gpus}\n" in script(gpus_per_node=gpus)


@pytest.mark.parametrize("gpus", ["eight", "", "0", "-1", "8.0", "a100", "a100:", "a100:x", "8 "])
def test_any_other_request_for_gpus_is_refused(gpus: str) -> None:
    with pytest.raises(ConfigError, match=r"^--gpus-per-node: expected a number of GPUs, or kind:number, got '"):
        script(gpus_per_node=gpus)


def test_memory_is_a_number_with_a_unit() -> None:
    for memory in ("0", "4000", "400G", "1t"):
        assert f"#SBATCH --mem={memory}\n" in script(mem=memory)
    for memory in ("lots", "400 G", "4.5G", "-1"):
        with pytest.raises(ConfigError, match=r"^--mem: expected memory such as 400G, got"):
            script(mem=memory)


@pytest.mark.parametrize(
    ("option", "advice"),
    [
        ("--signal=B:TERM@60", "--signal itself; use --warning-seconds"),
        ("--sig=B:TERM@60", "--signal itself"),
        ("--signal B:TERM@60", "--signal itself"),
        ("--time=5", "use --time"),
        ("-t5", "use --time"),
        ("-N 4", "use --nodes"),
        ("--gpus-per-node=1", "use --gpus-per-node"),
        ("--output=elsewhere", "the job's output goes to the run folder"),
        ("--no-requeue", "requeued until the training has ended"),
        ("--chdir=/", "from which it is submitted"),
    ],
)
def test_an_option_that_would_replace_the_scripts_own_is_refused(option: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=f"^--sbatch={option}: the job script sets .*{advice}"):
        script(more=(option,))


@pytest.mark.parametrize(
    "option", ["--qos=high", "--exclusive", "--gpus=8", "--time-min=10", "--mem-per-gpu=10G", "-w n1"]
)
def test_any_other_option_is_passed_on(option: str) -> None:
    assert f"#SBATCH {option}\n" in script(more=(option,))
