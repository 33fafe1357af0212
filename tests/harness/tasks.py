"""A small made-up data set: noisy copies of random pictures, one picture per class, in two "designs"."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from partialfc.data.dataset import DatasetWriter


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_set(folder: Path, num_classes: int, samples: int, seed: int, first_picture: int = 0) -> None:
    rng = np.random.default_rng(seed)
    with DatasetWriter(folder) as writer:
        for sample in range(samples):
            for label in range(num_classes):
                picture = np.random.default_rng(1000 + first_picture + label).integers(0, 255, (16, 16))
                design = "plain" if sample % 2 else "odd"
                writer.write(f"c{label}s{sample}-{design}", _png(picture + rng.normal(0, 40, (16, 16))), "png", label)
        writer.finish([{"name": f"class {first_picture + label}"} for label in range(num_classes)])


def write_task(folder: Path) -> dict[str, Any]:
    """A training set of 37 classes × 6, a verification set, a closed set; returns a config that trains on them."""
    write_set(folder / "train", 37, 6, seed=1)
    write_set(folder / "known", 37, 2, seed=2)
    write_set(folder / "verification", 12, 6, seed=3, first_picture=500)
    protocol = {"plain": {"probe": ["plain"], "gallery": ["plain", "odd"]}, "look_alikes": []}
    (folder / "verification" / "protocol.json").write_text(json.dumps(protocol))
    return {
        "run": {"dir": str(folder / "run"), "seed": 3, "timeout": 60},
        "data": {"train": str(folder / "train"), "global_batch_size": 20, "last_batch": "keep", "image_size": 16},
        "model": {"embedding_dim": 32},
        "head": {
            "loss": {"name": "arcface", "scale": 16, "margin": 0.1},
            "sample_rate": 0.5,
            "center_loss": {"weight": 0.001},
        },
        "optim": {"epochs": 3, "lr": 0.05, "warmup": 0.5, "head_lr_factor": 5, "clip": 1.0},
        "evaluation": {"sets": [str(folder / "verification"), str(folder / "known")], "every": 20},
        "tracking": {"log_every": 1},
    }
