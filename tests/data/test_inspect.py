"""``partialfc data inspect``: numbers and pictures of a set."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from partialfc.data.dataset import DatasetWriter, TarDataset
from partialfc.data.inspect import count_samples, describe_set, draw_sheet
from tests.harness.data_sets import png, write_samples
from tests.harness.running import ENVIRONMENT, partialfc
from tests.harness.tars import sample_members, write_tar


def described(data: TarDataset) -> str:
    return "\n".join(describe_set(data, count_samples(data)))


def test_classes_samples_images_and_shards_are_described(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "d", samples_per_shard=4) as writer:
        for i in range(9):
            writer.write(f"{i}", png(i, size=8 if i % 3 else 16), "png", [0, 0, 0, 0, 0, 1, 1, 1, 2][i])
        colour = io.BytesIO()
        Image.new("RGB", (20, 10)).save(colour, "JPEG")
        writer.write("9", colour.getvalue(), "jpg", 3)
        writer.finish([{"name": f"c{i}"} for i in range(5)], {"source": "somewhere"})
    text = described(TarDataset(tmp_path / "d"))
    lines = text.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'd'}: 10 samples of 5 classes, 3 shards, ")
    assert lines[1] == "samples per class: least 0, median 1, most 5; classes by their samples:"
    bars = [line.split() for line in lines[2:6]]
    assert [(bar[0], bar[-1]) for bar in bars] == [("0", "1"), ("1", "2"), ("2–3", "1"), ("4–7", "1")]
    assert len(bars[1][1]) == 2 * len(bars[0][1]), "the bar is as long as its number"
    assert "sizes: 8×8 60.0%, 16×16 30.0%, 20×10 10.0%" in text
    assert "kinds: PNG L 90.0%, JPEG RGB 10.0%" in text
    assert 'source: "somewhere"' in text


def test_counts_are_those_of_the_labels(tmp_path: Path) -> None:
    data = TarDataset(write_samples(tmp_path / "d", [3, 1, 3, 3]))
    assert count_samples(data).tolist() == [0, 1, 0, 3]


def test_images_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    data = TarDataset(write_tar(tmp_path / "a.tar", sample_members([0, 1], image=b"no")))
    assert f"2 cannot be used, the first: {tmp_path / 'a.tar'}: sample '0000' (index 0) cannot be" in described(data)
    draw_sheet(data, count_samples(data), tmp_path / "sheet.png")


def test_an_empty_set_is_described_and_drawn(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "d") as writer:
        writer.finish([])
    data = TarDataset(tmp_path / "d")
    assert "0 samples of 0 classes, 0 shards" in described(data)
    assert draw_sheet(data, count_samples(data), tmp_path / "sheet.png") == 0


def test_a_sheet_shows_the_images_of_each_class_in_its_row(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "d") as writer:
        for i in range(30):
            label = i % 3
            writer.write(f"{i}", png(60 + 60 * label, size=20), "png", 2 * label)  # each class has a grey of its own
        writer.finish([{"name": name} for name in ("é", "empty", "\x1b[31m", "", "漢" * 200)])
    data = TarDataset(tmp_path / "d")
    assert draw_sheet(data, count_samples(data), tmp_path / "sheet.png") == 3
    with Image.open(tmp_path / "sheet.png") as image:
        pixels = np.asarray(image.convert("L"))
    greys = [60, 120, 180]
    rows = [np.flatnonzero((pixels == grey).sum(axis=1) >= 8 * 90) for grey in greys]
    assert all(len(row) >= 90 for row in rows), "eight images of 96 pixels side by side"
    assert rows[0].max() < rows[1].min() < rows[1].max() < rows[2].min()


def test_another_seed_draws_other_classes(tmp_path: Path) -> None:
    data = TarDataset(write_samples(tmp_path / "d", list(range(100)), num_classes=100))
    sheets = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        draw_sheet(data, count_samples(data), tmp_path / name, seed)
        sheets.append((tmp_path / name).read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]


def test_the_command_takes_files_and_draws(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"{i}.tar", sample_members([i], str(i), png(3))) for i in range(2)]
    done = partialfc("data", "inspect", *paths, "--sheet", tmp_path / "sheet.png")
    assert done.returncode == 0, done.stderr
    assert "2 samples of 2 classes, 2 shards" in done.stdout
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    done = partialfc("data", "inspect", *paths, "--sheet", "/nowhere/sheet.png")
    assert (done.returncode, "--sheet: /nowhere/sheet.png cannot be written" in done.stderr) == (2, True)


def test_what_the_locale_cannot_write_is_printed_as_escapes(tmp_path: Path) -> None:
    write_samples(tmp_path / "d", [0, 1])
    done = partialfc("data", "inspect", tmp_path / "d", cold=True, env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "\\u2588" in done.stdout


@pytest.mark.parametrize("words", [["inspect", "/nowhere"], ["verify", "/nowhere"]])
def test_a_missing_set_is_one_line(words: list[str]) -> None:
    done = partialfc("data", *words)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "index.json is missing" in done.stdout + done.stderr
