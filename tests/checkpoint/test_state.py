"""Training states saved and loaded: complete at any world size, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from partialfc import ConfigError, RowAdamW, RowSGD
from partialfc.checkpoint.folders import latest_valid
from partialfc.checkpoint.writer import save_checkpoint
from partialfc.errors import CheckpointFailed
from tests.harness.checkpoints import made, train_a_little
from tests.harness.ranks import Ranks


@pytest.mark.parametrize("kind", [RowSGD, RowAdamW])
def test_loading_restores_everything(tmp_path: Path, kind: Any) -> None:
    state = made(kind)
    train_a_little(state)
    save_checkpoint(tmp_path / "step-00000003", state.tensors(), {"step": 3, "samples": 21})
    found = latest_valid(tmp_path)
    assert found is not None
    other = made(kind, start=2)
    other.load(found[0])
    for name, value in state.tensors().items():
        loaded = other.tensors()[name]
        assert torch.equal(loaded, value), name
        assert loaded.dtype == value.dtype
    assert train_a_little(other) == train_a_little(state)


def test_another_head_or_model_is_refused_with_the_difference(tmp_path: Path) -> None:
    state = made()
    train_a_little(state)
    save_checkpoint(tmp_path / "step-00000003", state.tensors(), {"step": 3, "samples": 21})
    for options, words in (
        ({"classes": 12}, r"head.weight has shape \[11, 8\] there and \[12, 8\] in this run"),
        ({"center_loss": None}, "holds head.center_loss.centers, which this run does not have"),
    ):
        with pytest.raises(ConfigError, match=words):
            made(**options).load(tmp_path / "step-00000003")


def _save(group: Any, folder: Path, classes: int) -> list[float]:
    state = made(classes=classes, process_group=group)
    train_a_little(state)
    save_checkpoint(folder / "step-00000003", state.tensors(), {"step": 3, "samples": 21})
    return train_a_little(state)


def _load(group: Any, folder: Path, classes: int) -> list[float]:
    found = latest_valid(folder)
    assert found is not None
    state = made(start=8, classes=classes, process_group=group)
    state.load(found[0])
    return train_a_little(state)


@pytest.mark.parametrize("classes", [11, 2])
def test_uneven_and_empty_shards_load_at_another_world_size(ranks: Ranks, tmp_path: Path, classes: int) -> None:
    # All four ranks of the pool take part: torch's checkpoint works on the default group.
    curves = ranks.run(4, _save, tmp_path, classes)
    for again in ranks.run(4, _load, tmp_path, classes):
        assert again == pytest.approx(curves[0], rel=1e-6)
    alone = made(start=8, classes=classes)
    alone.load(tmp_path / "step-00000003")
    assert train_a_little(alone) == pytest.approx(curves[0], rel=1e-5)


def _save_until_full(group: Any, folder: Path) -> list[str]:
    found = []
    state = made(classes=4000, process_group=group, sample_rate=1.0)
    for step in range(1, 6):
        train_a_little(state, 1)
        try:
            save_checkpoint(folder / f"step-{step:08d}", state.tensors(), {"step": step, "samples": 0})
            found.append("written")
        except CheckpointFailed as error:
            found.append(str(error))
    newest = latest_valid(folder)
    assert newest is not None
    made(start=3, classes=4000, process_group=group, sample_rate=1.0).load(newest[0])
    return found


def test_a_full_disk_costs_no_checkpoint_and_no_rank_hangs(ranks: Ranks, small_disk: Path) -> None:
    results = ranks.run(4, _save_until_full, small_disk)
    assert results[0][0] == "written"
    assert "No space left on device" in results[0][-1]
    for result in results:
        assert result == results[0], "the same on every rank"
    assert not list(small_disk.glob(".*")), "an unfinished checkpoint frees its space"
