"""One safetensors file of all parts of a checkpoint."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import torch

from partialfc.checkpoint.folders import find_checkpoint
from partialfc.checkpoint.reader import stored_tensors
from partialfc.errors import ConfigError, DataError
from partialfc.exchange.reading import map_file, read_into, reserve
from partialfc.files import open_new
from partialfc.tracking.console import Progress, no_progress

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def merge(folder: Path, out: Path, only: str = "", progress: Progress = no_progress) -> int:
    """Write the tensors of a checkpoint, whole, into one safetensors file, and return its size in bytes.

    The file is mapped and filled part by part: memory holds one part of one tensor at a time, whatever the size of the
    head. (The format's own library writes from memory only.)

    Args:
        folder: a checkpoint, or a run folder for its newest valid one.
        only: write only the tensors whose names begin with this, for example ``head.weight``.

    Raises:
        ConfigError: no tensor's name begins with ``only``, or ``out`` exists.
        DamagedCheckpoint: the checkpoint was modified.
        DataError: ``out`` cannot be written (a full disk).
    """
    checkpoint, manifest = find_checkpoint(folder)
    stored = {name: entry for name, entry in stored_tensors(checkpoint).items() if name.startswith(only)}
    if not stored:
        raise ConfigError(f"{checkpoint} holds no tensor whose name begins with {only!r}")
    if out.exists():
        raise ConfigError(f"{out} exists; choose another file, or remove it")
    # Wide types first: every tensor then begins at a multiple of its own width.
    names = sorted(stored, key=lambda name: (-stored[name].properties.dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"step": str(manifest["step"]), "format": "pt"}}
    places, end = {}, 0
    for name in names:
        dtype, shape = stored[name].properties.dtype, tuple(stored[name].size)
        places[name] = end
        end += torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [places[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = out.with_name(f".{out.name}.incomplete")
    try:
        start = 8 + len(text)
        with open_new(temporary) as file:
            reserve(file, start + end)
            file.write(len(text).to_bytes(8, "little") + text)
        with progress("merging", len(names)) as advance:
            for name in names:
                entry = stored[name]
                tensor = map_file(temporary, start + places[name], tuple(entry.size), entry.properties.dtype)
                read_into(checkpoint, {name: tensor})
                advance(1, note=name)
        temporary.rename(out)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return start + end
