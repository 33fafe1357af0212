"""Saving while training continues."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from partialfc.checkpoint import writer as saving
from partialfc.checkpoint.folders import latest_valid, restore_replaced
from partialfc.checkpoint.writer import Saver
from partialfc.config import parse_config
from partialfc.engines.state import ReplicatedBackbone
from partialfc.errors import CheckpointFailed
from partialfc.exchange.merge import merge
from partialfc.runs.folder import RunFolder, forget_after
from partialfc.runs.state import read_state
from partialfc.tracking.metrics import read_metrics
from tests.harness.checkpoints import made, train_a_little
from tests.harness.ranks import Ranks

MANIFEST = {"step": 3, "samples": 21}


def _save_and_train_on(group: Any, folder: Path, asynchronous: bool) -> tuple[list[float], int]:
    """Save every third step while training; return the losses after the first save, and the saves announced."""
    state = made(process_group=group)
    complete: list[int] = []
    saver = Saver(asynchronous, saved=lambda: complete.append(1))
    train_a_little(state)
    curves = []
    for save in range(1, 4):
        saver.save(folder / f"step-{save * 3:08d}", state.tensors(), {"step": save * 3, "samples": 0})
        curves.append(train_a_little(state))
        state.head.apply_deferred_decay()
    saver.wait()
    assert [ended.error for ended in saver.ended()] == [None] * 3
    assert saver.ended() == []
    return curves[0], len(complete)


def _go_on(group: Any, checkpoint: Path) -> list[float]:
    state = made(start=5, process_group=group)
    state.load(checkpoint)
    return train_a_little(state)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_checkpoint_holds_the_state_at_the_call(ranks: Ranks, tmp_path: Path, asynchronous: bool) -> None:
    results = ranks.run(4, _save_and_train_on, tmp_path, asynchronous)
    assert [announced for _, announced in results] == [3, 0, 0, 0], "by rank 0"
    again = ranks.run(4, _go_on, tmp_path / "step-00000003")
    for (curve, _), other in zip(results, again, strict=True):
        assert other == pytest.approx(curve, rel=1e-6)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_later_changes_do_not_reach_the_checkpoint(tmp_path: Path, asynchronous: bool) -> None:
    state = made()
    train_a_little(state)
    before = {name: value.clone() for name, value in state.tensors().items()}
    saver = Saver(asynchronous, saved=int)
    for step in (3, 4):  # the second time the copy is made in the same memory
        saver.save(tmp_path / f"step-{step:08d}", state.tensors(), {"step": step, "samples": 0})
        with torch.no_grad():
            for value in state.tensors().values():
                value.add_(1)
        saver.wait()
        found = latest_valid(tmp_path)
        assert found is not None
        assert found[1]["step"] == step
        other = made(start=2)
        other.load(found[0])
        for name, value in other.tensors().items():
            assert torch.equal(value, before[name] + (step - 3)), name


def test_at_most_one_save_is_in_flight_and_training_waits_only_for_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, running = threading.Semaphore(0), []

    def slow(folder: Path, *_: Any) -> None:
        running.append(folder.name)
        assert len(running) == 1
        gate.acquire()
        running.remove(folder.name)

    monkeypatch.setattr(saving, "save_checkpoint", slow)
    saver = Saver(True, saved=int)
    saver.save(tmp_path / "first", {"x": torch.zeros(3)}, MANIFEST)  # returns although nothing is written
    assert not saver.wait(0.05), "it is still writing"
    second = threading.Thread(target=saver.save, args=(tmp_path / "second", {"x": torch.zeros(3)}, MANIFEST))
    second.start()
    time.sleep(0.1)
    assert running == ["first"]
    gate.release()
    gate.release()
    second.join(5)
    saver.wait()
    assert [ended.folder.name for ended in saver.ended()] == ["first", "second"]


def test_a_failed_background_save_is_reported_and_the_next_one_works(tmp_path: Path, small_disk: Path) -> None:
    state = made(classes=4000, sample_rate=1.0)
    saver = Saver(True, saved=int)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(800_000))
    saver.save(small_disk / "step-00000003", state.tensors(), MANIFEST)
    saver.wait()
    (ended,) = saver.ended()
    assert isinstance(ended.error, CheckpointFailed)
    assert str(ended.error).startswith("the checkpoint could not be written (rank 0: ")
    assert "is the disk full?" in str(ended.error)
    assert "Traceback" not in str(ended.error)
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]
    ballast.unlink()
    saver.save(small_disk / "step-00000004", state.tensors(), MANIFEST)
    saver.wait()
    assert saver.ended()[0].error is None
    assert latest_valid(small_disk) is not None


def _save_with_a_failing_rank(group: Any, folder: Path) -> list[str]:
    state = made(process_group=group)
    saver = Saver(True, saved=int)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        if group.rank() == 1:
            patch.setattr(saving, "describe_file", lambda path: [].pop())
        saver.save(folder / "step-00000003", state.tensors(), MANIFEST)
        saver.wait(20)
        found += [str(ended.error) for ended in saver.ended()]
    saver.save(folder / "step-00000004", state.tensors(), MANIFEST)
    saver.wait(20)
    return found + [str(ended.error) for ended in saver.ended()]


def test_a_failure_on_one_rank_fails_on_all_and_the_next_save_works(ranks: Ranks, tmp_path: Path) -> None:
    for first, second in ranks.run(4, _save_with_a_failing_rank, tmp_path):
        assert "rank 1: IndexError: pop from empty list" in first
        assert second == "None"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def _save_batch_statistics(group: Any, folder: Path) -> None:
    state = made(process_group=group)
    backbone = torch.nn.Sequential(*(torch.nn.BatchNorm1d(8) for _ in range(3)))
    state.backbone = ReplicatedBackbone(backbone, torch.optim.SGD(backbone.parameters()))
    for buffer in backbone.buffers():
        buffer.fill_(group.rank() + 1)
    saving.save_checkpoint(folder / "step-00000003", state.tensors(), MANIFEST)


def test_saved_batch_statistics_are_all_of_one_rank(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(4, _save_batch_statistics, tmp_path)
    merge(tmp_path / "step-00000003", tmp_path / "all.safetensors", only="backbone.")
    buffers = {name: value for name, value in load_file(tmp_path / "all.safetensors").items() if value.dim() == 0}
    buffers |= {name: value for name, value in load_file(tmp_path / "all.safetensors").items() if "running" in name}
    assert len(buffers) == 9
    for name, value in buffers.items():
        assert (value == 1).all(), name


# From Python 3.13 on a stream of torch's that the "kill" leaves open complains when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_a_kill_while_a_checkpoint_is_replaced_leaves_one_of_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    """A head that has grown without a step replaces the checkpoint that it grew from."""
    saving.save_checkpoint(tmp_path / "step-00000003", made().tensors(), MANIFEST | {"samples": 1})
    begun, moves = _begun(tmp_path), 0

    def move_or_die(real: Any) -> Any:
        def move(path: Path, *arguments: Any, **options: Any) -> None:
            nonlocal moves
            moves += Path(path).exists()
            if moves == killed_at:
                raise KeyboardInterrupt  # like a kill, nobody catches it
            real(path, *arguments, **options)

        return move

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", move_or_die(Path.rename))
        patch.setattr(saving.shutil, "rmtree", move_or_die(saving.shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            saving._finish(*begun)
    restore_replaced(tmp_path)
    found = latest_valid(tmp_path)
    assert found is not None
    assert found[1]["samples"] == (2 if killed_at == 3 else 1)
    saving.save_checkpoint(tmp_path / "step-00000003", made().tensors(), MANIFEST | {"samples": 4})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def _begun(folder: Path) -> tuple[Path, Path, dict[str, Any], list[dict[str, Any]]]:
    """State of the disk and of the writer before a checkpoint of step 3 gets its name."""
    temporary = folder / ".step-00000003.incomplete"
    saving._begin(temporary, ())
    saving._write_tensors(temporary, made(start=1).tensors(), None)
    files = {path.name: saving.describe_file(path) for path in temporary.iterdir()}
    return temporary, folder / "step-00000003", MANIFEST | {"samples": 2}, [files]


def test_leftovers_of_a_killed_save_are_cleared_by_the_next(tmp_path: Path) -> None:
    for name in (".step-00000001.incomplete", ".step-00000002.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("…")
    saving.save_checkpoint(tmp_path / "step-00000003", made().tensors(), MANIFEST)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_extra_files_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    table = tmp_path / "classes.jsonl"
    table.write_text('{"id": 0, "name": "ann"}\n')
    saving.save_checkpoint(tmp_path / "all" / "step-00000003", made().tensors(), MANIFEST, (table,))
    copy = tmp_path / "all" / "step-00000003" / "classes.jsonl"
    assert copy.read_text() == table.read_text()
    assert latest_valid(tmp_path / "all") is not None
    copy.write_text('{"id": 0, "name": "bob"}\n')
    assert latest_valid(tmp_path / "all") is None, "and checked like the others"


def test_a_full_disk_ends_no_run_and_costs_no_line_of_metrics(small_disk: Path) -> None:
    config = parse_config({"run": {"dir": str(small_disk / "run")}, "data": {"train": "unused"}})
    folder = RunFolder(config, 300, 0)
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left"):
        ballast.write_bytes(bytes(1_000_000))
    for step in range(1, 300):
        folder.metrics.write("train", step=step, note="é" * 40)
        folder.set_state("running", step)
    with pytest.raises(OSError, match="No space left"):
        folder.set_state("finished", 299)
    assert read_state(config.run.dir) is not None, "the one before is still there"
    assert [path.name for path in config.run.dir.glob(".*")] == [".lock"]
    ballast.unlink()
    folder.metrics.write("train", step=300)
    folder.set_state("finished", 300)
    folder.close()
    written = [line["step"] for line in read_metrics(config.run.dir / "metrics.jsonl") if line["kind"] == "train"]
    assert written == list(range(1, 301))


@pytest.mark.parametrize(
    "torn", [b'{"kind": "train", "step": 2, "n": "\xc3', b'{"kind": "train", "step": 2}', b"\0\0", b"7"]
)
def test_a_torn_line_of_metrics_is_harmless(tmp_path: Path, torn: bytes) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(b'{"kind": "train", "step": 1}\n' + torn)
    forget_after(metrics, 2)
    with metrics.open("a") as file:
        file.write('{"kind": "train", "step": 3}\n')
    steps = [line["step"] for line in read_metrics(metrics)]
    assert steps == ([1, 2, 3] if torn.endswith(b"}") else [1, 3])
