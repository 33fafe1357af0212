"""Job scripts that `launch slurm` writes, and requests that it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from partialfc.errors import ConfigError
from partialfc.launch.scripts import script
from partialfc.launch.slurm import Request, job_script, seconds_of
from tests.harness.running import finish


def test_launch_slurm_writes_a_script_with_everything_in_it(tmp_path: Path) -> None:
    request = Request(
        4, "1-00:00:00", "gpu big", "lab", "h100:8", 64, "400G", 600, ("--qos=high", "--comment=a b c", "-x n1")
    )
    text = job_script(
        request, "face", Path("runs/face"), Path("my config.yaml"), ["optim.lr=0.2", "x=$(boom)", "--force"]
    )
    for option in (
        "--nodes=4",
        "--time=1-00:00:00",
        '--partition="gpu big"',
        "--account=lab",
        "--gpus-per-node=h100:8",
        "--cpus-per-task=64",
        "--mem=400G",
        "--signal=B:USR1@600",
        "--requeue",
        "--qos=high",
        '--comment="a b c"',
        "-x n1",
        f"--chdir={Path.cwd()}",
        f"--output={Path.cwd()}/runs/face/slurm-%j.out",
    ):
        assert f"#SBATCH {option}\n" in text
    assert text.count("#SBATCH --time=") == 1
    assert """set -- 'my config.yaml' optim.lr=0.2 'x=$(boom)' --force "$@"\n""" in text
    assert f"PYTHON={sys.executable}\n" in text
    assert text.startswith("#!/usr/bin/env bash\n#SBATCH")
    path = tmp_path / "job.sbatch"
    path.write_text(text)
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "300 seconds" not in text, "what is said there of the defaults does not hold here"


def test_a_percent_sign_in_the_name_of_a_run_folder_is_not_filled_in_by_sbatch(tmp_path: Path) -> None:
    text = job_script(Request(1, "60"), "lr50%j", tmp_path / "lr50%j", Path("c.yaml"), [])
    assert f"#SBATCH --output={tmp_path}/lr50%%j/slurm-%j.out\n" in text


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("5:30", 330),
        ("1:00:10", 3610),
        ("2-12", 216000),
        ("2-12:30", 217800),
        ("1-0:0:1", 86401),
        ("UNLIMITED", None),
        ("0", None),
    ],
)
def test_time_limits_are_read_as_sbatch_does(time: str, seconds: float | None) -> None:
    assert seconds_of(time) == seconds
    assert f"#SBATCH --time={time}\n" in job_script(Request(1, time), "r", Path("r"), Path("c.yaml"), [])


def test_a_quote_in_the_run_folder_is_reported_as_run_dir() -> None:
    with pytest.raises(ConfigError, match=r"run\.dir: .*a\"b"):
        job_script(Request(1, "60"), 'a"b', Path('a"b'), Path("c.yaml"), [])


@pytest.mark.parametrize(
    "wrong",
    [
        {"time": "soon"},
        {"time": "5"},  # as long as the warning
        {"time": "10", "warning_seconds": 700},
        {"more": ("qos",)},
        {"partition": 'a"b'},
        {"account": "a\n#SBATCH --uid=0"},
    ],
)
def test_a_request_that_sbatch_would_misread_is_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        job_script(Request(**{"nodes": 1, "time": "60", **wrong}), "face", Path("run"), Path("c.yaml"), [])


def test_an_unknown_script_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"train\.sbatch"):
        script("train")


def test_the_command_refuses_a_wrong_config_prints_and_says_where_there_is_no_slurm(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"run: {{dir: {tmp_path / 'run'}}}\ndata: {{train: x}}\n")
    words = [sys.executable, "-m", "partialfc", "launch", "slurm", str(config), "--nodes", "2", "--time", "60"]
    environment = {**os.environ, "PATH": "/nowhere"}

    def said(*more: str) -> subprocess.CompletedProcess[str]:
        return finish([*words, *more], env=environment)

    wrong = said("optim.lr=fast")
    assert wrong.returncode == 2
    assert "optim.lr" in wrong.stderr
    dry = said("--dry-run")
    assert dry.returncode == 0
    assert "#SBATCH --nodes=2\n" in dry.stdout
    assert f"#SBATCH --output={Path.cwd()}/slurm-%j.out\n" in dry.stdout, "the run folder does not exist"
    assert not dry.stderr
    long = said("--dry-run", "--force", "--warning-seconds=2000")
    assert "each start trains for 1600 s of its 3600 s" in long.stderr
    assert '--force "$@"' in long.stdout
    (tmp_path / "file").touch()
    no_place = said(f"run.dir={tmp_path / 'file' / 'run'}")
    assert no_place.returncode == 2
    assert no_place.stderr.startswith("error: run.dir: ")
    assert not (tmp_path / "run").exists()
    nowhere = said()
    assert nowhere.returncode == 1
    assert "sbatch is not installed here" in nowhere.stderr
    assert (tmp_path / "run" / "job.sbatch").exists()
