"""benchmarks/index.py: opening an index costs no memory that grows with the samples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.running import ENVIRONMENT

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "index.py"


@pytest.mark.slow
@pytest.mark.parametrize("samples", [3_000_000, 300_000_000])
def test_an_index_of_any_size_is_opened_in_little_private_memory(tmp_path: Path, samples: int) -> None:
    command = [sys.executable, SCRIPT, "--samples", "10000", "--open", str(samples), "--dir", str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["samples"] == samples
    assert found["private_mb"] < 100
    assert found["private_mb_after"] < 100
