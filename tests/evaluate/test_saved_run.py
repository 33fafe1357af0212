"""partialfc evaluate: the newest checkpoint of a run, on its own sets and on others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.harness.running import lines, partialfc, run
from tests.harness.tasks import write_set, write_task


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(write_task(folder)))
    done = run(config, 2, "evaluation.every=0", "optim.epochs=1")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


@pytest.mark.parametrize("ranks", [0, 3])
def test_a_run_is_evaluated_as_at_its_end_on_any_number_of_ranks(finished: Path, ranks: int) -> None:
    before = lines(finished, "evaluation")[-1]["results"]
    written = finished / "evaluation" / "step-00000012.json"
    written.unlink()
    (finished / "stop").touch()  # concerns only training in this folder
    done = partialfc("evaluate", finished, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    (finished / "stop").unlink()
    after = json.loads(written.read_text())
    assert after.keys() == before.keys()
    assert after["known"] == pytest.approx(before["known"])
    assert after["plain"]["tar_at_far"] == pytest.approx(before["plain"]["tar_at_far"])
    assert "known: accuracy" in done.stdout


def test_other_sets_leave_the_results_of_the_run_unchanged(finished: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "new", 37, 3, seed=9)
    before = {path: path.read_bytes() for path in (finished / "evaluation").iterdir()}
    done = partialfc("evaluate", finished, "--set", tmp_path / "new")
    assert done.returncode == 0, done.stdout + done.stderr
    write_set(tmp_path / "elsewhere" / "new", 37, 2, seed=9)
    done = partialfc("evaluate", finished, "--set", tmp_path / "elsewhere" / "new")
    assert done.returncode == 0, done.stdout + done.stderr
    written = [json.loads(path.read_text()) for path in (finished / "evaluation").glob("step-00000012-new-*.json")]
    assert sorted(results["new"]["samples"] for results in written) == [74, 111]
    assert all(path.read_bytes() == text for path, text in before.items())


def test_results_that_cannot_be_written_are_printed_and_said_so_before_the_work(finished: Path) -> None:
    folder = finished / "evaluation"
    folder.rename(finished / "aside")
    folder.write_text("in the way")
    done = partialfc("evaluate", finished)
    folder.unlink()
    (finished / "aside").rename(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "evaluation cannot be written (" in done.stdout
    assert done.stdout.index("the results are only printed") < done.stdout.index("known: accuracy")


def test_a_folder_that_is_not_a_run_is_refused_in_one_line(tmp_path: Path) -> None:
    done = partialfc("evaluate", tmp_path / "nothing")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"error: {tmp_path / 'nothing'} does not exist; expected the folder of a run with checkpoints"
    ]
