"""Folders of checkpoints: the latest valid one is found, damaged ones never, and old ones are removed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from partialfc.checkpoint.folders import latest_valid, prune, set_aside, step_folders
from partialfc.checkpoint.manifest import read_manifest, verify
from partialfc.checkpoint.writer import save_checkpoint
from partialfc.errors import DamagedCheckpoint
from tests.harness.checkpoints import made, train_a_little


@pytest.mark.parametrize("attempts", [100, pytest.param(1000, marks=pytest.mark.slow)])  # on each file
def test_no_random_damage_is_ever_loaded(tmp_path: Path, attempts: int) -> None:
    state = made()
    train_a_little(state)
    table = tmp_path / "classes.jsonl"
    table.write_text("".join(json.dumps({"id": label, "name": f"class {label}"}) + "\n" for label in range(11)))
    checkpoint = tmp_path / "all" / "step-00000003"
    save_checkpoint(checkpoint, state.tensors(), {"step": 3, "samples": 21, "data_digest": "a1b2"}, (table,))
    files = {path: path.read_bytes() for path in sorted(checkpoint.iterdir())}
    manifest = read_manifest(checkpoint)
    rng = np.random.default_rng(0)
    for path, content in files.items():
        for attempt in range(attempts):  # some three bytes of the file in each
            damaged = bytearray(content)
            if attempt % 10 == 0:
                damaged = damaged[: int(rng.integers(0, len(damaged)))]
            else:
                for place in rng.integers(0, len(damaged), size=1 + attempt % 6):
                    damaged[place] ^= int(rng.integers(1, 256))
            path.write_bytes(damaged)
            try:
                # White space may change in a manifest, or a letter and back again: what it says may not.
                assert verify(checkpoint) == manifest, f"{path.name}, attempt {attempt}"
            except DamagedCheckpoint:
                assert damaged != content
        path.write_bytes(content)
    for path, content in files.items():  # several thousand bytes in every file at once
        path.write_bytes(bytes(rng.integers(0, 256, size=len(content), dtype=np.uint8)))
    assert latest_valid(checkpoint.parent) is None
    for path, content in files.items():
        path.write_bytes(content)
    assert latest_valid(checkpoint.parent) == (checkpoint, manifest)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "cannot be read"),
        ("{}", "is not a checkpoint's manifest"),
        (
            '{"format": 1, "step": 3, "samples": 21, "files": {".metadata": {"bytes": 1, "sha256": ""}}}',
            "digest mismatch",
        ),
    ],
)
def test_a_file_that_is_not_a_manifest_is_reported(tmp_path: Path, content: str, words: str) -> None:
    checkpoint = tmp_path / "step-00000003"
    save_checkpoint(checkpoint, made().tensors(), {"step": 3, "samples": 21})
    (checkpoint / "manifest.json").write_text(content)
    with pytest.raises(DamagedCheckpoint, match=words):
        read_manifest(checkpoint)


def test_other_files_beside_checkpoints_are_ignored(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "step-00000003", made().tensors(), {"step": 3, "samples": 21})
    for name in ("step-²", "step-new", "step-00000009.bak", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000008").write_text("a file")
    (tmp_path / "step-00000007").symlink_to(tmp_path / "nowhere")
    assert [path.name for path in step_folders(tmp_path)] == ["step-00000003"]


def test_old_checkpoints_are_removed_but_the_last_and_the_milestones(tmp_path: Path) -> None:
    def write(step: int) -> None:
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / "manifest.json").write_text("{}")

    for step in (10, 20, 30, 40, 50, 60):
        write(step)
    assert [path.name for path in prune(tmp_path, keep_last=2, keep_every=20)] == ["step-00000030", "step-00000010"]
    assert [int(path.name[5:]) for path in step_folders(tmp_path)] == [60, 50, 40, 20]
    (tmp_path / "step-00000060" / "manifest.json").unlink()  # not whole: does not count as one of the last
    prune(tmp_path, keep_last=1, keep_every=0)
    assert [int(path.name[5:]) for path in step_folders(tmp_path)] == [60, 50]
    assert not list(tmp_path.glob(".*")), "nothing half removed is left"


def test_checkpoints_set_aside_no_longer_count_and_are_not_lost(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "manifest.json").write_text("")
    (tmp_path / "aside-1-step-00000020").mkdir()
    places = [path.name for path in set_aside(tmp_path, 10)]
    assert places == ["aside-1-step-00000030", "aside-2-step-00000020"]
    (tmp_path / "step-00000015").mkdir()
    (tmp_path / "step-00000015" / "manifest.json").write_text("")
    assert [path.name for path in prune(tmp_path, keep_last=1, keep_every=0)] == ["step-00000010"]
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000015", "aside-1-step-00000020", *places}
