"""The examples, run as their first lines say."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.harness.running import ENVIRONMENT, torchrun

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, *options: str) -> str:
    """Run an example in this process, and return what it prints."""
    monkeypatch.setattr(sys, "argv", [name, *options])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def losses_in(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]


@pytest.mark.parametrize("name", ["ddp_loop.py", "custom_loss.py"])
def test_an_example_learns_alone(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = losses_in(run_alone(monkeypatch, capsys, name))
    assert found[-1] < 0.5 * found[0]


def test_stored_embeddings_train_a_projection_and_centres(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = losses_in(run_alone(monkeypatch, capsys, "stored_embeddings.py", "--out", str(tmp_path / "first")))
    assert found[-1] < 0.5 * found[0]
    files = ["--embeddings", str(tmp_path / "first" / "embeddings.npy"), "--labels", str(tmp_path / "first/labels.npy")]
    run_alone(monkeypatch, capsys, "stored_embeddings.py", "--out", str(tmp_path / "second"), *files)
    centres, again = (np.load(tmp_path / name / "class_centers.npy") for name in ("first", "second"))
    np.testing.assert_array_equal(centres, again)
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1.0, rtol=1e-5)


def test_the_ddp_loop_prints_the_same_losses_on_two_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = losses_in(run_alone(monkeypatch, capsys, "ddp_loop.py"))
    command = torchrun(2, str(EXAMPLES / "ddp_loop.py"))
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert losses_in(done.stdout) == pytest.approx(alone, rel=2e-2), "the loss is the mean over the global batch"


def test_the_ddp_loop_is_sixty_lines() -> None:
    code = (EXAMPLES / "ddp_loop.py").read_text(encoding="utf-8")
    body = code.split('"""', 2)[2]
    assert len([line for line in body.splitlines() if line.strip()]) <= 60


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_says_how_to_run_it(path: Path) -> None:
    assert f"examples/{path.name}" in path.read_text(encoding="utf-8").split('"""')[1]
