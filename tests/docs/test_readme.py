"""The blocks that README prints, compared with what the code prints."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from partialfc.config import load_config
from partialfc.data.dataset import TarDataset
from partialfc.planning.dry_run import dry_run
from partialfc.runs.listing import describe_runs
from tests.harness.running import partialfc, run
from tests.harness.tasks import write_task

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(first_line: str) -> list[str]:
    """Return the lines of README's block with this beginning."""
    (found,) = [text for text in re.findall(r"```\n(.*?)```", README, re.DOTALL) if text.startswith(first_line)]
    return found.splitlines()


def pinned_torch() -> str:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return re.findall(r"^torch==(.*)$", constraints, re.MULTILINE)[0]


def test_the_dry_run_prints_what_readme_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.__version__.split("+")[0] != pinned_torch():
        pytest.skip(f"activations are those of torch {pinned_torch()}")
    command, *shown = block("$ partialfc train configs/")
    config, ranks = re.findall(r"train (\S+) --dry-run --ranks (\d+)", command)[0]
    monkeypatch.chdir(ROOT)
    assert "\n".join(dry_run(load_config(config), int(ranks))).splitlines() == shown


def quick_start() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the last train line and the results of the quick start, as README prints them."""
    text = "\n".join(block("installing the packages"))
    loss, cosine, rate = re.findall(
        r"^training .* loss ([\d.]+)  cos ([\d.]+)  ([\d,]+) images/s$", text, re.MULTILINE
    )[-1]
    results = {
        name: {"tar_at_far": {far: float(tar) for tar, far in re.findall(r"TAR ([\d.]+) at FAR (\S+)", line)}}
        for name, line in re.findall(r"^(unseen_\w+): (.*)$", text, re.MULTILINE)
    }
    return {"loss": float(loss), "target_cosine": float(cosine), "samples_per_s": int(rate.replace(",", ""))}, results


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "cosface": (
        {"state": "running", "step": 201, "seconds_left": 156, "age": 4},
        {"loss": 8.48, "target_cosine": 0.2, "samples_per_s": 333},
        {},
    ),
    "rate-0.1": (
        {"state": "running", "step": 104, "age": 102},
        {"loss": 8.877, "target_cosine": 0.072, "samples_per_s": 333},
        {},
    ),
    "quickstart": ({"state": "finished", "step": 1250, "age": 287}, *quick_start()),
}


def test_the_list_of_runs_looks_as_readme_shows(tmp_path: Path) -> None:
    now = time.time()
    for name, (state, train, results) in RUNS.items():
        folder = tmp_path / name
        folder.mkdir()
        written = {"total_steps": 1250, "attempt": 1, "updated": now - state["age"], **state}
        (folder / "state.json").write_text(json.dumps(written))
        lines: list[dict[str, Any]] = [{"kind": "train", "step": state["step"], **train}]
        if results:
            lines.append({"kind": "evaluation", "step": state["step"], "results": results})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = block("run         state")
    assert without_ages(describe_runs(tmp_path).splitlines()) == without_ages(shown)


def without_ages(lines: list[str]) -> list[str]:
    """Return the lines without seconds that pass while the test runs, and without the width of their column."""
    return [re.sub(r"\s+(written|(\d+m)?\d+s ago)$", " …", re.sub(r"\d+s; its", "…s; its", line)) for line in lines]


def test_the_head_in_readme_runs() -> None:
    (example,) = [text for text in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "PartialFC(" in text]
    names: dict[str, Any] = {"num_classes": 20, "embedding_dim": 8, "backbone": torch.nn.Linear(6, 8)}
    names |= {"images": torch.randn(4, 6), "labels": torch.tensor([0, 3, -1, 19])}
    exec(example, names)
    assert names["out"].num_samples == 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quick_start_prints_what_readme_shows(tmp_path: Path) -> None:
    """Compare its lines without numbers, its accuracy within the spread of machines, and the scores of nearest.py."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def printed_by(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    glyphs = ("--out", "data/glyphs", "--classes", "2000", "--size", "32", "--fonts", "small")
    output = printed_by("-m", "partialfc", "data", "glyphs", *glyphs)
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "partialfc", "train")
    output += printed_by(*launcher, str(ROOT / "configs" / "quickstart.yaml"))
    shown = [
        line for line in block("installing the packages") if not re.match(r"installing|fetching|…|\w+ .*ETA", line)
    ]
    printed = {without_numbers(LOG_TIME.sub("", line)) for line in output.splitlines()}
    missing = [line for line in shown if without_numbers(line) not in printed]
    assert not missing, output
    for name in ("unseen_characters", "unseen_font"):
        (there,), (here,) = (
            re.findall(rf"{name}: .*TAR ([\d.]+) at FAR 0.001", text) for text in ("\n".join(shown), output)
        )
        assert float(here) == pytest.approx(float(there), abs=0.02)
    export, nearest, scores = export_block()
    assert exported(printed_by("-m", *export)) == without_numbers(shown_export())
    closed = TarDataset(tmp_path / "data" / "glyphs" / "closed_set")
    (tmp_path / nearest[1]).write_bytes(closed.read(closed.keys.index(nearest[1].removesuffix(".png"))))
    found = [SCORE.fullmatch(line) for line in printed_by(*nearest).splitlines()]
    for here, there in zip(found, map(SCORE.fullmatch, scores), strict=True):
        assert here is not None
        assert there is not None
        assert float(here[1]) == pytest.approx(float(there[1]), abs=0.1)
    assert found[0] is not None
    assert f"{found[0][2]}  (class {found[0][3]})" in scores[0], "the right character"


LOG_TIME = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ")
SCORE = re.compile(r"(\d\.\d{4})  (.+)  \(class (\d+)\)")


def export_block() -> tuple[list[str], list[str], list[str]]:
    """Return README's commands that export and find classes, as words, and the lines of the latter."""
    text = "\n".join(block("$ pip install -c"))
    export, nearest = (
        shlex.split(found, comments=True) for found in re.findall(r"^\$ (?:python )?((?!pip).*)$", text, re.M)
    )
    return export, nearest, text.rpartition("\n$ ")[2].splitlines()[1:]


def shown_export() -> str:
    """Return the line, folded in README, that the export prints."""
    text = "\n".join(block("$ pip install -c"))
    return " ".join(text.split("\n$ ")[1].splitlines()[1:])


def exported(output: str) -> str:
    """Return the line on an export in a command's output, without the time and numbers."""
    (found,) = [line for line in output.splitlines() if ", from step-" in line]
    return without_numbers(found.split("  ", 1)[1])


def test_an_export_and_its_nearest_classes_print_what_readme_shows(tmp_path: Path) -> None:
    export, nearest, scores = export_block()
    tree = write_task(tmp_path)
    tree["run"]["dir"] = export[2]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    trained = run(tmp_path / "config.yaml", 0, "evaluation.sets=[]", "optim.epochs=1", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    done = partialfc(*export[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert exported(done.stdout) == without_numbers(shown_export())
    (tmp_path / nearest[1]).write_bytes(TarDataset(tmp_path / "known").read(0))
    command = [sys.executable, *nearest]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True).stdout.splitlines()
    assert len(found) == len(scores) == int(nearest[2])
    assert all(SCORE.fullmatch(line) for line in (*found, *scores))


def without_numbers(line: str) -> str:
    return " ".join(re.sub(r"[\d.,]+(e-\d+)?", "#", re.sub(r"\d+m\d+s|\d+s\b", "#", line)).split())
