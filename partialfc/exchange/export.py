"""What a run has learnt, in formats that other programs read."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.planner import ReadItem

from partialfc import __version__, models
from partialfc.checkpoint.class_table import CLASSES
from partialfc.checkpoint.row_planner import RowLoadPlanner
from partialfc.config import Config, parse_config
from partialfc.errors import ConfigError, DataError, ExportFailed, MissingDependency
from partialfc.exchange.reading import find_checkpoint, map_file, read_into, reserve, stored_tensors
from partialfc.tracking.console import Advance, Progress, no_progress
from partialfc.tracking.metrics import add_event

ABOUT, WEIGHTS, ONNX, CENTERS, EXAMPLE = (
    "export.json",
    "backbone.safetensors",
    "backbone.onnx",
    "class_centers.npy",
    "nearest.py",
)
_TOLERANCE = 1e-4  # largest difference between onnxruntime and torch, over the largest value
_EMBEDDED = 1 << 30  # bytes of weights up to which an ONNX file holds them itself; its format ends at 2 GiB
_PIECE = 1 << 14  # class centres normalised at once


@dataclass(frozen=True)
class Exported:
    """What has been written."""

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
    """Write the backbone of a run's newest whole checkpoint, and on request its class centres, into a folder.

    ``backbone.safetensors`` holds its state dict; ``backbone.onnx`` takes ``images`` [batch, channels, size, size]
    float32 in [-1, 1] of any batch size and gives ``embeddings`` [batch, D], not normalised; ``class_centers.npy``
    [classes, D] (or [classes, sub-centers, D]) the weight rows at unit length, in the order of ``classes.jsonl``.
    ``export.json`` describes them. The folder is complete or absent; an earlier export in it is replaced.

    Args:
        run: a run folder, or one of its checkpoints.
        out: default: ``export`` in the run folder.
        centers: write the class centres, and ``nearest.py``, which uses them.
        center_dtype: of the class centres.
        onnx: write the ONNX file.
        model: the run's ``model.name``, repeated, where that is not one of ours: a checkpoint may come from anywhere,
            and only the caller can say that the code it names may run.

    Raises:
        ConfigError: ``out`` holds something else, or ``model`` is missing.
        DamagedCheckpoint: there is no whole checkpoint.
        ExportFailed: the ONNX file does not compute what the backbone does.
        DataError: ``out`` cannot be written.
        MissingDependency: an exporter is not installed.
    """
    if onnx:
        _require_onnx()
    checkpoint, manifest = find_checkpoint(run)
    out = out or (run if run != checkpoint else run.parent.parent) / "export"
    if out.exists() and not (out / ABOUT).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} holds something that is not an export; choose another --out")
    config = parse_config(manifest["config"])
    models.require_trust(config.model.name, model, f"{checkpoint}")
    backbone = _read_backbone(checkpoint, config)
    temporary = out.with_name(f".{out.name}.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        shape = (config.data.channels, config.data.image_size, config.data.image_size)
        about: dict[str, Any] = {
            "model": config.model.name,
            "embedding_dim": config.model.embedding_dim,
            "input": {
                "mode": "L" if config.data.channels == 1 else "RGB",
                "size": config.data.image_size,
                "pixels": "value / 127.5 - 1, channels first",
            },
            "step": manifest["step"],
            "samples": manifest["samples"],
            "num_classes": manifest["num_classes"],
            "partialfc": __version__,
        }
        _write_weights(backbone, temporary / WEIGHTS, about)
        difference = _write_onnx(backbone, temporary / ONNX, shape) if onnx else None
        if (checkpoint / CLASSES).exists():
            shutil.copyfile(checkpoint / CLASSES, temporary / CLASSES)
        if centers:
            about["class_centers"] = _write_centers(checkpoint, temporary / CENTERS, center_dtype, progress)
            if onnx and (temporary / CLASSES).exists():
                shutil.copyfile(Path(__file__).with_name(EXAMPLE), temporary / EXAMPLE)
        (temporary / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
        add_event(checkpoint.parent.parent, "export", step=manifest["step"], path=str(out.resolve()))
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(out, sorted(path.name for path in out.iterdir()), checkpoint, difference)


def _read_backbone(checkpoint: Path, config: Config) -> nn.Module:
    model, data = config.model, config.data
    backbone = models.build(model.name, model.embedding_dim, data.channels, data.image_size, model.options)
    read_into(checkpoint, {f"backbone.{name}": value for name, value in backbone.state_dict().items()})
    return backbone.eval()


def _write_weights(backbone: nn.Module, path: Path, about: dict[str, Any]) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise _missing("safetensors") from error
    tensors = {name: value.contiguous() for name, value in backbone.state_dict().items()}
    save_file(tensors, path, metadata={name: json.dumps(value) for name, value in about.items()})


def _require_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError as error:
            raise _missing(name) from error


def _missing(name: str) -> MissingDependency:
    return MissingDependency(f"export needs {name}: pip install -c constraints.txt '.[export]' (or use --no-onnx)")


def _write_onnx(backbone: nn.Module, path: Path, shape: tuple[int, int, int]) -> float:
    """Write, and compare with torch on batches of several sizes; returns the largest relative difference."""
    import onnxruntime

    size = sum(value.numel() * value.element_size() for value in backbone.state_dict().values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # what it does not find and does not need
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            backbone,
            (torch.zeros(2, *shape),),
            path,
            input_names=["images"],
            output_names=["embeddings"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=size > _EMBEDDED,
            verbose=False,
        )
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
        raise ExportFailed(f"the ONNX file differs from the backbone by {worst:.1e}, more than {_TOLERANCE:.0e}")
    return worst


class _UnitRows(RowLoadPlanner):
    """Divides rows by their length on the way from the dtype in which they were stored to another."""

    def __init__(self, advance: Advance) -> None:
        super().__init__({})
        self._advance = advance

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return torch.empty(read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        target = super().resolve_tensor(read_item)
        for start in range(0, len(tensor), _PIECE):
            piece = slice(start, start + _PIECE)
            target[piece] = nn.functional.normalize(tensor[piece], dim=-1).to(target.dtype)
            self._advance(len(tensor[piece]))


def _write_centers(checkpoint: Path, path: Path, dtype: str, progress: Progress) -> dict[str, Any]:
    """The head's rows at unit length in one ``.npy``, of which memory never holds more than one stored part."""
    shape = tuple(stored_tensors(checkpoint)["head.weight"].size)
    with path.open("wb") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        offset = file.tell()
    kind = getattr(torch, dtype)
    reserve(path, offset + torch.Size(shape).numel() * kind.itemsize)
    with progress("class centres", shape[0]) as advance:
        read_into(checkpoint, {"head.weight": map_file(path, offset, shape, kind)}, _UnitRows(advance))
    return {"shape": shape, "dtype": dtype, "length": 1}
