"""Files of a checkpoint that take time, memory or a place that they should not."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from partialfc.checkpoint import reader
from partialfc.checkpoint.manifest import MANIFEST, read_manifest
from partialfc.checkpoint.reader import CheckedReader
from partialfc.checkpoint.writer import save_checkpoint
from partialfc.errors import DamagedCheckpoint
from tests.harness.checkpoints import made

# A pair of the pair before it, sixty times: its hash, its text and its comparison take 2⁶⁰ steps.
BOMB = b")\x940" + b"".join(b"h%ch%c\x86\x940" % (n, n) for n in range(60)) + b"h<"
SIZE = b"ctorch\nSize\n"
FORMAT = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
LAYOUT = b"ctorch.serialization\n_get_layout\n"
PROPERTIES = b"ctorch.distributed.checkpoint.metadata\nTensorProperties\n"
INDEX = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
DEEP = b")" + b"\x85" * 300_000


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "step-00000003", made().tensors(), {"step": 3, "samples": 21})
    return tmp_path / "step-00000003"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"}" + BOMB + b"Ns.", id="a key of nested pairs"),
        pytest.param(b"}(" + BOMB + b"Nu.", id="one of several keys"),
        pytest.param(b"(" + BOMB + b"Nd.", id="a key of a whole dictionary"),
        pytest.param(b"\x8f(" + BOMB + b"\x90.", id="a member of a set"),
        pytest.param(b"(" + BOMB + b"\x91.", id="a member of a frozen set"),
        pytest.param(FORMAT + BOMB + b"\x85R.", id="a memory format"),
        pytest.param(FORMAT + BOMB + b"\x85\x81.", id="an instance of a memory format"),
        pytest.param(b"cbuiltins\ngetattr\n" + FORMAT + BOMB + b"\x86R.", id="the name of a memory format"),
        pytest.param(PROPERTIES + b")\x81(NNN" + BOMB + b"Ntb.", id="the memory format of a tensor"),
        pytest.param(LAYOUT + BOMB + b"\x85R.", id="a layout"),
        pytest.param(b"}" + INDEX + b")\x81}\x8c\x03fqn" + BOMB + b"sbNs.", id="the name in a key"),
        pytest.param(b"}" + INDEX + b")\x81}(\x8c\x03fqn\x8c\x01a\x8c\x06offset" + BOMB + b"ubNs.", id="its offset"),
        pytest.param(b"}" + DEEP + b"Ns.", id="a key very deep"),
        pytest.param(DEEP + b".", id="very deep"),
        pytest.param(SIZE + b"(" + b"K\x01" * 1000 + b"t\x85R.", id="a thousand dimensions"),
        pytest.param(INDEX + b"(\x8c\x01a" + b"(" + b"K\x01" * 1000 + b"ttR.", id="the same through a key"),
    ],
)
def test_an_index_that_would_never_end_is_refused_at_once(checkpoint: Path, content: bytes) -> None:
    (checkpoint / ".metadata").write_bytes(b"\x80\x04" + content)
    with pytest.raises(DamagedCheckpoint, match=r"\.metadata (cannot be read|is not a checkpoint's index)") as refused:
        CheckedReader(checkpoint).read_metadata()
    assert len(str(refused.value)) < 400


def test_sizes_that_are_none_are_refused(checkpoint: Path) -> None:
    index: Metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    name, entry = next(iter(index.state_dict_metadata.items()))
    entry.chunks[0].sizes = (entry.size[0], 1.5)  # type: ignore[union-attr]
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(DamagedCheckpoint, match=f"gives {name} a size that is none"):
        CheckedReader(checkpoint).read_metadata()
    index.state_dict_metadata = {MetadataIndex("a", torch.Size([1])): entry}  # type: ignore[dict-item]
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(DamagedCheckpoint, match="a tensor without a name"):
        CheckedReader(checkpoint).read_metadata()


def test_files_beyond_their_bounds_and_no_files_are_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as smaller:
        smaller.setattr(reader, "_MAX_INDEX", 100)
        with pytest.raises(DamagedCheckpoint, match="cannot be read: larger than 100 bytes"):
            CheckedReader(checkpoint).read_metadata()
    manifest = checkpoint / MANIFEST
    kept = manifest.read_bytes()
    for content, words in ((b"[" * 100_000, "nested too deeply"), (b"\xff{}", "utf-8")):
        manifest.write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match=words):
            read_manifest(checkpoint)
    with manifest.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DamagedCheckpoint, match="larger than"):
        read_manifest(checkpoint)
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(DamagedCheckpoint, match="not a regular file"):
        read_manifest(checkpoint)
    manifest.unlink()
    manifest.symlink_to("/dev/zero")
    with pytest.raises(DamagedCheckpoint, match="not a regular file"):
        read_manifest(checkpoint)
    manifest.unlink()
    manifest.write_bytes(kept)
    (checkpoint / ".metadata").unlink()
    os.mkfifo(checkpoint / ".metadata")
    with pytest.raises(DamagedCheckpoint, match="not a regular file"):
        CheckedReader(checkpoint).read_metadata()
