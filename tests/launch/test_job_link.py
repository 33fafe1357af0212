"""The job script in a run folder."""

from __future__ import annotations

import os
from pathlib import Path

from tests.harness.running import ENVIRONMENT, partialfc


def test_a_link_in_place_of_the_job_script_is_replaced_and_not_followed(short_task: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / "job.sbatch").symlink_to(tmp_path / "precious")
    done = partialfc("launch", "slurm", short_task, "--nodes", 1, "--time", 60, env=ENVIRONMENT | {"PATH": os.devnull})
    assert "sbatch is not installed here" in done.stderr
    assert (tmp_path / "precious").read_text() == "precious"
    assert (run / "job.sbatch").read_text().startswith("#!")
