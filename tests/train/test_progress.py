"""Progress of a run on the console."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.harness.running import finish, run

FAULTY = str(Path(__file__).parents[1] / "harness" / "faulty_run.py")


def test_a_resumed_run_counts_from_the_beginning_of_the_run(task: Path, tmp_path: Path) -> None:
    settings = [f"run.dir={tmp_path}/run", "evaluation.every=0", "evaluation.sets=[]", "optim.epochs=1"]  # 12 steps
    settings += ["checkpoint.every=6", "run.skipped_in_a_row=3"]
    first = finish([sys.executable, FAULTY, str(task), "gradient", "0", "9,10,11", *settings])
    assert first.returncode == 1, "three in a row"
    assert re.search(r"training  1[01]/12 .*\(stopped\)", first.stdout), first.stdout
    again = run(task, 0, *settings)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming from step 6 " in again.stdout
    assert "training  12/12 (100%)  " in again.stdout
