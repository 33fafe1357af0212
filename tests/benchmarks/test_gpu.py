"""benchmarks/gpu.sh: without a GPU it runs all its sections on small sizes, and its comparison is able to fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(700)

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
SECTIONS = {"ceilings", "correctness", "late_errors", "waits", "speed", "kernels", "memory", "nccl", "trainer"}


def measure(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "PARTIALFC_DATA": ""}
    command = ["bash", str(SCRIPT), str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gpu")
    done = measure(folder, "--seconds", "300")  # it takes a fifth of that, or less
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "results.txt").read_text() in done.stdout
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_every_section_is_there_and_none_has_failed(results: dict[str, Any]) -> None:
    assert set(results["sections"]) == SECTIONS
    assert results["problems"] == []
    assert not [name for name, section in results["sections"].items() if "failed" in section]
    assert all("entries" in section or "skipped" in section for section in results["sections"].values())


def test_what_needs_no_gpu_is_measured(results: dict[str, Any]) -> None:
    for name in ("ceilings", "correctness", "late_errors", "speed", "nccl"):
        entries = results["sections"][name]["entries"]
        missing = [
            key for key, entry in entries.items() if isinstance(entry, dict) and {"skipped", "error"} & set(entry)
        ]
        assert entries, name
        assert not missing, f"{name}: {missing}"
    for name in ("waits", "kernels", "memory"):
        assert results["sections"][name]["skipped"] == "needs a GPU"


def test_no_case_lies_over_its_tolerance(results: dict[str, Any]) -> None:
    entries = results["sections"]["correctness"]["entries"]
    compared = {name: entry for name, entry in entries.items() if isinstance(entry, dict) and "over tolerance" in entry}
    assert len(compared) >= 2
    for name, entry in compared.items():
        assert entry["cases"] > 0, name
        assert entry["left out"] == 0, name
        assert entry["over tolerance"] == 0, name


def test_rounded_logits_are_noticed(results: dict[str, Any]) -> None:
    entries = results["sections"]["correctness"]["entries"]
    controls = [entry for name, entry in entries.items() if name.startswith("negative control")]
    assert controls
    assert all(entry["noticed"] for entry in controls)


def test_an_unknown_section_is_refused_with_the_names_of_those_there_are(tmp_path: Path) -> None:
    done = measure(tmp_path, "speeed")
    assert done.returncode == 2
    assert "no such section: speeed" in done.stderr
    assert "ceilings" in done.stderr
