"""Indexes of checkpoints: hostile, damaged and of other versions."""

from __future__ import annotations

import io
import pathlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata

from partialfc import ConfigError
from partialfc.checkpoint.reader import CheckedReader, _IndexUnpickler
from partialfc.checkpoint.writer import save_checkpoint
from partialfc.errors import DamagedCheckpoint
from tests.harness.checkpoints import Hostile, made, train_a_little


def test_a_hostile_index_is_not_executed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-00000003"
    state = made()
    save_checkpoint(checkpoint, state.tensors(), {"step": 3, "samples": 21})
    for content in (pickle.dumps(Hostile(f"touch {tmp_path}/owned")), b"\x80\x04cposix\nsystem\n.", b"", b"garbage"):
        (checkpoint / ".metadata").write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match=r"\.metadata cannot be read"):
            CheckedReader(checkpoint).read_metadata()
        with pytest.raises(DamagedCheckpoint):
            state.load(checkpoint)
    assert not (tmp_path / "owned").exists()


def test_an_index_cannot_modify_classes_of_the_process(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-00000003"
    save_checkpoint(checkpoint, made().tensors(), {"step": 3, "samples": 21})
    # The class, (None, {"name": "../../secret"}), and the instruction to fill the one with the other.
    attributes = b"N}\x8c\x04name\x8c\x0c../../secrets\x86b."
    for kind in (b"cpathlib\nPosixPath\n", b"ctorch.distributed.checkpoint.metadata\nMetadata\n"):
        (checkpoint / ".metadata").write_bytes(b"\x80\x04" + kind + attributes)
        with pytest.raises(DamagedCheckpoint, match="must not be given attributes"):
            CheckedReader(checkpoint).read_metadata()
    assert Path("a/b").name == "b"


MOMENTUM = "head.optimizer.weight.momentum_buffer"


def _set(attribute: str, value: Any) -> Any:
    """Return an edit of an index: a field of one of its tensors, or of its place."""

    def edit(metadata: Any) -> None:
        place = next(place for index, place in metadata.storage_data.items() if index.fqn == MOMENTUM)
        tensor = metadata.state_dict_metadata[MOMENTUM]
        setattr(place if hasattr(place, attribute) else tensor, attribute, value)

    return edit


def _drop_places(metadata: Any) -> None:
    metadata.storage_data = {}


def _hold_an_object(metadata: Any) -> None:
    metadata.state_dict_metadata["head.weight"] = BytesStorageMetadata()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_set("relative_path", "../../secret"), "points outside the folder"),
        (_set("relative_path", "/etc/passwd"), "points outside the folder"),
        (_set("relative_path", "__7_0.distcp"), "points to __7_0.distcp, which the manifest does not list"),
        (_set("relative_path", 3), "is not a checkpoint's index"),
        (_set("offset", -1), "does not say where"),
        (_set("length", 1 << 60), f"promises more of {MOMENTUM} than the files hold"),
        (_set("chunks", []), f"does not hold the whole of {MOMENTUM}"),
        (_set("chunks", [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([5, 8]))]), "does not hold the whole"),
        (_set("size", torch.Size([10**9, 10**9])), "does not hold the whole"),
        (_set("size", torch.Size([11, 10**12])), "does not hold the whole"),
        (_drop_places, "than the files hold"),
        (_hold_an_object, "holds head.weight, which is not a tensor"),
        (lambda metadata: setattr(metadata, "storage_data", [1]), "is not a checkpoint's index"),
    ],
)
def test_an_index_is_refused_unless_each_tensor_lies_in_the_listed_files(tmp_path: Path, edit: Any, words: str) -> None:
    checkpoint = tmp_path / "step-00000003"
    state = made()
    train_a_little(state)
    save_checkpoint(checkpoint, state.tensors(), {"step": 3, "samples": 21})
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    edit(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(DamagedCheckpoint, match=words):
        made().load(checkpoint)


def test_tensors_of_another_optimizer_or_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    state = made()
    train_a_little(state)
    tensors = state.tensors()
    save_checkpoint(tmp_path / "step-00000003", tensors | {MOMENTUM: torch.zeros(11, 9)}, {"step": 3, "samples": 21})
    with pytest.raises(ConfigError, match=r"does not fit this optimizer: .*momentum_buffer has shape \[11, 9\] there"):
        made().load(tmp_path / "step-00000003")
    save_checkpoint(tmp_path / "step-00000004", tensors, {"step": 4, "samples": 21})
    (data,) = (tmp_path / "step-00000004").glob("*.distcp")
    data.write_bytes(bytes(data.stat().st_size))
    with pytest.raises(DamagedCheckpoint, match="step-00000004 cannot be read: "):
        made().load(tmp_path / "step-00000004")


class ByGetattr:
    """Pickles members of an enumeration like Python before 3.11.4."""

    def __init__(self, kind: Any, name: str) -> None:
        self.kind, self.name = kind, name

    def __reduce__(self) -> Any:
        return getattr, (self.kind, self.name)


def test_an_index_that_an_older_python_has_written_is_read() -> None:
    kind = metadata._MEM_FORMAT_ENCODING
    content = pickle.dumps(ByGetattr(kind, kind.TORCH_CONTIGUOUS_FORMAT.name))
    assert _IndexUnpickler(io.BytesIO(content)).load() is kind.TORCH_CONTIGUOUS_FORMAT
    for hostile in (ByGetattr(pathlib.PurePosixPath, "__subclasses__"), ByGetattr(metadata.Metadata, "__init__")):
        with pytest.raises((pickle.UnpicklingError, KeyError)):
            _IndexUnpickler(io.BytesIO(pickle.dumps(hostile))).load()
