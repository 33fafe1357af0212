"""The trained backbone and class centres of a run, in formats that other programs read."""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.planner import ReadItem

from partialfc import __version__, models
from partialfc.checkpoint.fit import require_fit
from partialfc.checkpoint.folders import find_checkpoint
from partialfc.checkpoint.reader import class_count, stored_tensors
from partialfc.checkpoint.row_planner import RowLoadPlanner
from partialfc.config import Config, parse_config
from partialfc.data.class_table import require_class_table
from partialfc.data.index import CLASSES
from partialfc.errors import ConfigError, DataError, ExportFailed, MissingDependency
from partialfc.exchange.reading import map_file, read_into, reserve
from partialfc.files import read_json, write_atomically
from partialfc.tracking.console import Advance, Progress, no_progress
from partialfc.tracking.metrics import add_event

ABOUT, WEIGHTS, ONNX, CENTERS, EXAMPLE = (
    "export.json",
    "backbone.safetensors",
    "backbone.onnx",
    "class_centers.npy",
    "nearest.py",
)
_FILES = (WEIGHTS, ONNX, f"{ONNX}.data", CENTERS, CLASSES, EXAMPLE, ABOUT)  # in the order in which they are replaced
_BACKBONE = "backbone."  # of the names in a checkpoint
_INCOMPLETE = ".incomplete"  # suffix or name of the folder in which an export is made
_MAX_ABOUT = 1 << 20  # bytes of an export.json
_TOLERANCE = 1e-4  # largest difference between onnxruntime and torch, over the largest value
_MAX_EMBEDDED = 1 << 30  # bytes of weights inside an ONNX file, whose format ends at 2 GiB; more go beside it
_BLOCK = 1 << 14  # class centres normalised at once


@dataclass(frozen=True)
class Exported:
    """The files of an export."""

    folder: Path
    files: list[str]
    checkpoint: Path
    onnx_difference: float | None  # between onnxruntime and torch, over the largest value


def export(
    run: Path,
    out: Path | None = None,
    centers: bool = False,
    center_dtype: Literal["float32", "float16"] = "float32",
    onnx: bool = True,
    progress: Progress = no_progress,
    model: str | None = None,
) -> Exported:
    """Write the backbone of a run's newest valid checkpoint and, on request, its class centres into a folder.

    ``backbone.safetensors`` holds its state dict; ``backbone.onnx`` takes ``images`` [batch, channels, size, size]
    float32 in [-1, 1] of any batch size and gives ``embeddings`` [batch, D], not normalised; ``class_centers.npy``
    [classes, D] (or [classes, sub-centers, D]) the weight rows at unit length, in the order of ``classes.jsonl``.
    ``export.json`` describes them. The export is complete or absent. An earlier one is replaced; other files beside it
    stay.

    Args:
        run: a run folder, or one of its checkpoints.
        out: folder to write; default: ``export`` in the run folder.
        centers: write the class centres, and ``nearest.py``, which uses them.
        onnx: write the ONNX file.
        model: confirms the run's ``model.name`` if that is not built in: a checkpoint may come from anywhere, and only
            the caller can allow the code that it names to run.

    Raises:
        ConfigError: ``run`` is no run, ``out`` holds something else, ``model`` is missing, or the backbone does not fit
            the checkpoint.
        DamagedCheckpoint: there is no valid checkpoint.
        InvalidData: its class table is damaged, or has another number of classes than its head.
        ExportFailed: the ONNX file and the backbone compute different embeddings.
        DataError: ``out`` cannot be written.
        MissingDependency: an exporter is not installed.
    """
    if onnx:
        _require_onnx()
    checkpoint, manifest = find_checkpoint(run)
    out = out or (run if run != checkpoint else run.parent.parent) / "export"
    _check_place(out)
    if (checkpoint / CLASSES).exists():  # which earlier versions took as it was
        require_class_table(checkpoint / CLASSES, class_count(checkpoint, manifest))
    config = parse_config(manifest.get("config", {}))
    models.require_trust(config.model.name, model, f"{checkpoint}")
    backbone = _read_backbone(checkpoint, config)
    place = Path(os.path.realpath(out))
    # On the file system of the folder, which may be a mounted one.
    temporary = place / _INCOMPLETE if place.exists() else place.with_name(f".{place.name}{_INCOMPLETE}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        shape = (config.data.channels, config.data.image_size, config.data.image_size)
        about = _describe(config, manifest, class_count(checkpoint, manifest))
        _write_weights(backbone, temporary / WEIGHTS, about)
        difference = _write_onnx(backbone, temporary / ONNX, shape) if onnx else None
        if CLASSES in manifest["files"]:
            shutil.copyfile(checkpoint / CLASSES, temporary / CLASSES)
        if centers:
            about["class_centers"] = _write_centers(checkpoint, temporary / CENTERS, center_dtype, progress)
            if onnx and (temporary / CLASSES).exists():
                shutil.copyfile(Path(__file__).with_name(EXAMPLE), temporary / EXAMPLE)
        (temporary / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        files = sorted(path.name for path in temporary.iterdir())
        _move_into_place(temporary, place)
        add_event(checkpoint.parent.parent, "export", step=manifest["step"], path=str(place))
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(out, files, checkpoint, difference)


def _check_place(out: Path) -> None:
    """Require that ``out`` is absent, an empty folder, or one with an earlier export.

    Raises:
        ConfigError: it is not, or holds a folder under the name of a file of an export.
    """
    try:
        present = os.path.lexists(out)
        others = present and any(path.name != _INCOMPLETE for path in out.iterdir())
        if others and not _is_export(out):
            raise ConfigError(f"{out} holds something that is not an export; choose another --out")
    except OSError as error:
        raise ConfigError(f"--out {out}: expected a folder ({error.strerror})") from error
    folders = [name for name in _FILES if present and (out / name).is_dir()]
    if folders:
        raise ConfigError(f"{out / folders[0]} is a folder, not the file of an export; choose another --out")


def _is_export(folder: Path) -> bool:
    try:
        about = read_json(folder / ABOUT, _MAX_ABOUT)
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and "partialfc" in about


def _move_into_place(temporary: Path, place: Path) -> None:
    """Replace an earlier export by the one in ``temporary``; nothing else in ``place`` is touched, no link followed."""
    mode = (temporary / ABOUT).stat().st_mode  # of a file as this process creates it; safetensors makes private ones
    for path in temporary.iterdir():
        path.chmod(mode)
    if not place.exists():
        temporary.rename(place)
        return
    # A kill from here on leaves the mark of an export that describes nothing.
    write_atomically(place / ABOUT, json.dumps({"partialfc": __version__}) + "\n")
    for name in _FILES:
        if (temporary / name).exists():
            (temporary / name).replace(place / name)
        else:
            (place / name).unlink(missing_ok=True)


def _describe(config: Config, manifest: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """Return the content of ``export.json``."""
    return {
        "model": config.model.name,
        "embedding_dim": config.model.embedding_dim,
        "input": {
            "mode": "L" if config.data.channels == 1 else "RGB",
            "size": config.data.image_size,
            "pixels": "value / 127.5 - 1, channels first",
        },
        "step": manifest["step"],
        "samples": manifest["samples"],
        "num_classes": num_classes,
        "partialfc": __version__,
    }


def _read_backbone(checkpoint: Path, config: Config) -> nn.Module:
    model, data = config.model, config.data
    backbone = models.build(model.name, model.embedding_dim, data.channels, data.image_size, model.options)
    targets = {f"{_BACKBONE}{name}": value for name, value in backbone.state_dict().items()}
    stored = {name: entry for name, entry in stored_tensors(checkpoint).items() if name.startswith(_BACKBONE)}
    require_fit(checkpoint, {name: value.shape for name, value in targets.items()}, stored)
    read_into(checkpoint, targets)
    return backbone.eval()


def _write_weights(backbone: nn.Module, path: Path, about: dict[str, Any]) -> None:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        raise _missing("safetensors") from error
    tensors = {name: value.contiguous() for name, value in backbone.state_dict().items()}
    try:
        save_file(tensors, path, metadata={name: json.dumps(value) for name, value in about.items()})
    except SafetensorError as error:  # a full disk
        raise OSError(str(error)) from error


def _require_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError as error:
            raise _missing(name) from error


def _missing(name: str) -> MissingDependency:
    return MissingDependency(f"export needs {name}: pip install -c constraints.txt '.[export]' (or use --no-onnx)")


def _write_onnx(backbone: nn.Module, path: Path, shape: tuple[int, int, int]) -> float:
    """Write the ONNX file, compare it with torch, and return the largest relative difference."""
    size = sum(value.numel() * value.element_size() for value in backbone.state_dict().values())
    with _quiet_exporter():
        torch.onnx.export(
            backbone,
            (torch.zeros(2, *shape),),
            path,
            input_names=["images"],
            output_names=["embeddings"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=size > _MAX_EMBEDDED,
            verbose=False,
        )
    return _compare_onnx(backbone, path, shape)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's messages about optional packages and its internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _compare_onnx(backbone: nn.Module, path: Path, shape: tuple[int, int, int]) -> float:
    """Return the largest difference from torch on batches of several sizes, relative to the largest value."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in (1, 2, 5):
        images = torch.rand(batch, *shape, generator=generator) * 2 - 1
        with torch.no_grad():
            expected = backbone(images)
        (found,) = session.run(None, {"images": images.numpy()})
        if found.shape != tuple(expected.shape):
            raise ExportFailed(f"the ONNX file gives {found.shape} for a batch of {batch}, not {tuple(expected.shape)}")
        worst = max(worst, float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max()))
    if not worst <= _TOLERANCE:
        raise ExportFailed(f"the ONNX file differs from the backbone by {worst:.1e}; the limit is {_TOLERANCE:.0e}")
    return worst


class _UnitRows(RowLoadPlanner):
    """Scales rows to unit length in the stored dtype, before they are converted to the target's."""

    def __init__(self, advance: Advance) -> None:
        super().__init__({})
        self._advance = advance

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return torch.empty(read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        target = super().resolve_tensor(read_item)
        for start in range(0, len(tensor), _BLOCK):
            block = slice(start, start + _BLOCK)
            target[block] = nn.functional.normalize(tensor[block], dim=-1).to(target.dtype)
            self._advance(len(tensor[block]))


def _write_centers(checkpoint: Path, path: Path, dtype: str, progress: Progress) -> dict[str, Any]:
    """Write the head's rows at unit length into one ``.npy``; memory holds one stored part at a time."""
    shape = tuple(stored_tensors(checkpoint)["head.weight"].size)
    with path.open("wb") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        offset = file.tell()
        kind = getattr(torch, dtype)
        reserve(file, offset + torch.Size(shape).numel() * kind.itemsize)
    with progress("class centres", shape[0]) as advance:
        read_into(checkpoint, {"head.weight": map_file(path, offset, shape, kind)}, _UnitRows(advance))
    return {"shape": shape, "dtype": dtype, "length": 1}
