"""Manifests, Parquet files and WebDataset tars, converted as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from partialfc.data.convert.manifest import Manifest
from partialfc.data.convert.parquet import Parquet
from partialfc.data.convert.pipeline import Options, convert
from partialfc.data.convert.source import Source
from partialfc.data.convert.webdataset_tars import WebDatasetTars
from partialfc.data.dataset import TarDataset
from tests.harness.data_sets import png
from tests.harness.parquet_files import image_struct, write_table
from tests.harness.tars import write_tar

NAMES = [f"person {i % 7}" for i in range(40)]


def csv_manifest(folder: Path) -> tuple[Source, Path]:
    for i in range(40):
        (folder / f"{i}.png").write_bytes(png(i))
    path = folder / "set.csv"
    path.write_text("path,identity\n" + "".join(f"{i}.png,{name}\n" for i, name in enumerate(NAMES)))
    return Manifest(path), path


def parquet_files(folder: Path) -> tuple[Source, Path]:
    for file in range(2):
        numbers = range(20 * file, 20 * file + 20)
        columns = {"image": image_struct([(png(i), None) for i in numbers]), "label": [NAMES[i] for i in numbers]}
        write_table(folder / f"train-{file:05d}-of-00002.parquet", columns, row_group_size=6)
    return Parquet(folder), folder


def parquet_of_paths(folder: Path) -> tuple[Source, Path]:
    csv_manifest(folder)
    path = write_table(folder / "set.parquet", {"path": [f"{i}.png" for i in range(40)], "label": NAMES})
    return Parquet(path), path


def tars(folder: Path) -> tuple[Source, Path]:
    for shard in range(4):
        numbers = range(10 * shard, 10 * shard + 10)
        members = [
            (f"{i}.{kind}", png(i) if kind == "png" else NAMES[i].encode()) for kind in ("png", "cls") for i in numbers
        ]
        write_tar(folder / f"s-{shard}.tar", members)
    pattern = f"{folder}/s-{{0..3}}.tar"
    return WebDatasetTars(pattern), Path(pattern)


@pytest.mark.parametrize("make", [csv_manifest, parquet_files, parquet_of_paths, tars])
def test_every_image_arrives_with_its_class_and_any_number_of_workers_writes_the_same(
    tmp_path: Path, make: Callable[[Path], tuple[Source, Path]]
) -> None:
    (tmp_path / "source").mkdir()
    source, origin = make(tmp_path / "source")
    for workers in (1, 2):
        convert(source, origin, tmp_path / str(workers), Options(samples_per_shard=9), workers=workers)
    for name in ("index.json", "shard-000000.tar", "shard-000004.tar"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    found = TarDataset(tmp_path / "1")
    images = {found.read(i): found.classes[int(found.labels[i])]["name"] for i in range(len(found))}
    assert images == {png(i): name for i, name in enumerate(NAMES)}
    assert len(set(found.keys)) == 40
    assert json.loads((tmp_path / "1" / "index.json").read_text())["source"]["kind"] == source.kind
