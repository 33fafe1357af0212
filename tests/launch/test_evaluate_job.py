"""The job script that evaluates a run, with the real torchrun and a stand-in for srun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""


def test_a_wrong_run_ends_the_job_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "slurm" / "evaluate.sbatch"), str(tmp_path / "nothing")],
        capture_output=True,
        text=True,
        env={**os.environ, **settings, "NPROC": "2", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert (
        done.stderr == f"error: {tmp_path / 'nothing'} does not exist; expected the folder of a run with checkpoints\n"
    )
    assert not list(tmp_path.glob("tmp.*")), "the file for the code is removed"
