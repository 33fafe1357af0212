"""Small data set folders, and ways to spoil them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from partialfc.data.dataset import DatasetWriter


def png(value: int, size: int = 8) -> bytes:
    encoded = io.BytesIO()
    Image.new("L", (size, size), value).save(encoded, "PNG")
    return encoded.getvalue()


def write_samples(folder: Path, labels: list[int], samples_per_shard: int = 10_000, num_classes: int = 4) -> Path:
    """A grey picture for each label; sample i has the key ``s<i>`` and the value i."""
    with DatasetWriter(folder, samples_per_shard) as writer:
        for i, label in enumerate(labels):
            writer.write(f"s{i:04d}", png(i % 256), "png", label)
        writer.finish([{"name": f"class {i}"} for i in range(num_classes)])
    return folder


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def write_table(path: Path, names: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "name": name}) + "\n" for i, name in enumerate(names)))
    return path


def forget_digests(folder: Path) -> None:
    """Make a folder as other tools write them, without digests."""

    def forget(index: dict[str, Any]) -> None:
        index.pop("digest")
        for shard in index["shardlist"]:
            shard.pop("sha256")

    edit_json(folder / "index.json", forget)
