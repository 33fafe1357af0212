"""``partialfc runs`` on folders that are missing, damaged, or written by others."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from partialfc.runs.listing import describe_runs
from tests.harness.running import partialfc


def write_run(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True)
    state = {"state": "running", "step": 500, "total_steps": 2000, "updated": time.time() - 3, "reason": ""}
    (folder / "state.json").write_text(json.dumps(state | values))
    lines = [{"kind": "train", "step": 480, "loss": 1.5}, {"kind": "train", "step": 500, "loss": 1.25}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def row_of(name: str, text: str) -> list[str]:
    (row,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return row.split()


@pytest.mark.parametrize("missing", ["nowhere", "state.json"])
def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path, missing: str) -> None:
    (tmp_path / "state.json").write_text("{}")
    for more in ([], ["--watch"]):
        done = partialfc("runs", tmp_path / missing, *more)
        assert done.returncode == 2
        assert done.stdout.count("\n") <= 1, "at most the time of --watch"
        assert done.stderr == (
            f"error: there is no folder {tmp_path / missing}; expected a run folder, or one above run folders\n"
        )


@pytest.mark.parametrize("spoilt", ["", '{"state": "runn', "[]", "{}", '{"state": 3}', "\0" * 400, "[" * 100_000])
def test_a_run_with_a_damaged_state_stays_in_the_list(tmp_path: Path, spoilt: str) -> None:
    write_run(tmp_path / "good")
    write_run(tmp_path / "spoilt")
    (tmp_path / "spoilt" / "state.json").write_text(spoilt)
    text = describe_runs(tmp_path)
    assert row_of("good", text)[:3] == ["good", "running", "500/2,000"]
    assert row_of("spoilt", text)[:2] == ["spoilt", "damaged"]
    assert "1.250" in row_of("spoilt", text)
    (note,) = [line for line in text.splitlines() if line.startswith("spoilt: ")]
    assert note.startswith("spoilt: state.json cannot be read (")
    assert note.endswith("); the next start of the run writes it anew")


def test_a_state_that_is_no_regular_file_keeps_nobody_waiting(tmp_path: Path) -> None:
    write_run(tmp_path / "good")
    write_run(tmp_path / "pipe")
    for name in ("state.json", "metrics.jsonl"):
        (tmp_path / "pipe" / name).unlink()
        os.mkfifo(tmp_path / "pipe" / name)
    write_run(tmp_path / "folder")
    (tmp_path / "folder" / "state.json").unlink()
    (tmp_path / "folder" / "state.json").mkdir()
    text = describe_runs(tmp_path)
    assert "pipe: state.json cannot be read (not a regular file)" in text
    assert "folder: state.json cannot be read (a folder, not a file)" in text
    assert row_of("good", text)[1] == "running"


def test_nothing_that_others_have_written_is_obeyed_by_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b]0;title\x07\x1b[2J\rall\nis well"
    shown = r"\x1b]0;title\x07\x1b[2J\rall is well"
    write_run(tmp_path / "x\x1b[31m", state="failed", reason=evil)
    results = {evil: {"accuracy": 0.5}}
    with (tmp_path / "x\x1b[31m" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "evaluation", "step": 500, "results": results}) + "\n")
    write_run(tmp_path / "y", state=evil)
    done = partialfc("runs", tmp_path)
    assert done.returncode == 0
    assert not set(done.stdout) & set(map(chr, [*range(10), *range(11, 32), 127]))
    assert done.stdout.count("\n") == 5, "a head, two rows, and a note below"
    assert f"x\\x1b[31m: {shown}\n" in done.stdout
    assert f"{shown} accuracy 0.5000" in done.stdout
