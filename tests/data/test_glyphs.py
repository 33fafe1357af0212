"""The glyph data set: traps of real fonts avoided, the same bytes every time."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from partialfc.data.dataset import TarDataset
from partialfc.data.glyphs import fonts
from partialfc.data.glyphs.fonts import FontFile
from partialfc.data.glyphs.generate import GlyphReport, make_glyphs
from partialfc.data.glyphs.render import em_for, han_codepoints, scan
from partialfc.errors import ConfigError, DataError
from tests.harness.fonts import NAMES, fonts_or_skip


def digests(report: GlyphReport) -> dict[str, str]:
    return {name: TarDataset(report.folder / name).digest for name in ("", "verification", "closed_set")}


def design_of(key: str) -> str:
    return key.split("-", 1)[1]


def test_the_three_folders_hold_what_the_protocol_needs(tiny: None, tmp_path: Path) -> None:
    report = make_glyphs(tmp_path / "g", 120, 32, "all", workers=2)
    training = TarDataset(tmp_path / "g")
    verification, closed_set = TarDataset(report.verification), TarDataset(report.closed_set)
    assert (report.num_classes, report.held_out_characters, report.reused) == (120, 100, False)
    assert (report.num_samples, report.verification_samples, report.closed_set_samples) == tuple(map(len, (
        training, verification, closed_set
    )))  # fmt: skip
    assert {design_of(key) for key in training.keys} == {"droid", "maruberi", "vl-gothic"}
    assert {design_of(key) for key in verification.keys} == set(NAMES)
    assert {design_of(key) for key in closed_set.keys} == {"aoyagi-soseki"}

    seen = {entry["codepoint"] for entry in training.classes}
    assert seen.isdisjoint(entry["codepoint"] for entry in verification.classes)
    assert [entry["codepoint"] for entry in closed_set.classes] == [entry["codepoint"] for entry in training.classes]
    for data in (training, verification, closed_set):
        assert data.num_classes in (100, 120)
        assert len(set(data.keys)) == len(data)
        assert [entry["samples"] for entry in data.classes] == np.bincount(
            data.labels, minlength=data.num_classes
        ).tolist()
        for key, label in zip(data.keys, data.labels, strict=True):
            entry = data.classes[label]
            assert key.startswith(f"u{ord(entry['name']):04X}-")
            assert entry["codepoint"] == f"U+{ord(entry['name']):04X}"
    assert min(Counter(training.labels.tolist()).values()) == 3
    assert np.bincount(verification.labels).min() == 4  # every held-out character is in the held-out font, too
    mixed = training.labels[:50]
    assert len(set(mixed.tolist())) > 35  # the stored order mixes the classes

    protocol = json.loads((report.verification / "protocol.json").read_text())
    known = ["droid", "maruberi", "vl-gothic"]
    assert sorted(protocol["unseen_characters"]["probe"]) == sorted(protocol["unseen_characters"]["gallery"]) == known
    assert protocol["unseen_font"]["probe"] == ["aoyagi-soseki"]
    assert sorted(protocol["unseen_font"]["gallery"]) == known
    assert all(0 <= a < b < 100 for a, b in protocol["look_alikes"])
    assert not [path for path in (tmp_path / "g").iterdir() if path.name.startswith(".")]


def test_images_show_whole_characters_of_a_good_size(tiny: None, tmp_path: Path) -> None:
    make_glyphs(tmp_path / "g", 60, 64, "all", workers=2)
    sizes = dict[str, list[int]]()
    for folder in ("", "verification"):
        data = TarDataset(tmp_path / "g" / folder)
        for i in range(len(data)):
            with Image.open(io.BytesIO(data.read(i))) as image:
                assert (image.mode, image.size, image.format) == ("L", (64, 64), "PNG")
                ink = 255 - np.asarray(image)
            edge = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
            assert edge.max() == 0, f"{data.key(i)} touches the edge: a stroke may be cut off"
            assert ink.max() > 200
            rows, columns = np.flatnonzero(ink.max(1)), np.flatnonzero(ink.max(0))
            middle = np.array([rows[0] + rows[-1], columns[0] + columns[-1]]) / 2
            assert np.abs(middle - 31.5).max() <= 1, f"{data.key(i)} is not centred"
            sizes.setdefault(design_of(data.key(i)), []).append(max(np.ptp(rows), np.ptp(columns)) + 1)
    for design, extents in sizes.items():
        assert 0.80 * 64 <= np.median(extents) <= 0.92 * 64, design


def test_the_same_arguments_give_the_same_bytes_for_any_number_of_workers(tiny: None, tmp_path: Path) -> None:
    one, two = (make_glyphs(tmp_path / str(n), 50, 32, "all", workers=n) for n in (1, 2))
    assert digests(one) == digests(two)
    assert list(one.digests.values()) == list(digests(one).values())
    for name in ("shard-000000.tar", "verification/shard-000000.tar", "verification/protocol.json", "index.json"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()


def test_a_complete_data_set_is_reused_and_a_different_one_is_refused(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "g"
    first = make_glyphs(out, 50, 32, "all", workers=1)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    again = make_glyphs(out, 50, 32, "all", workers=1)
    assert again.reused
    assert again.digests == first.digests
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == before
    with pytest.raises(DataError, match=r"a different data set \(num_classes=50\)"):
        make_glyphs(out, 51, 32, "all", workers=1)
    anew = make_glyphs(out, 51, 32, "all", workers=1, overwrite=True)
    assert (anew.reused, anew.num_classes, len(TarDataset(out).classes)) == (False, 51, 51)

    (out / "verification" / "shard-000000.tar").write_bytes(b"")
    with pytest.raises(DataError, match="missing or damaged"):
        make_glyphs(out, 51, 32, "all", workers=1)
    make_glyphs(out, 51, 32, "all", workers=1, overwrite=True)
    with monkeypatch.context() as patch:  # an upgraded font
        patch.setattr(FontFile, "digest", lambda self: "other")
        with pytest.raises(DataError, match="other versions of the fonts"):
            make_glyphs(out, 51, 32, "all", workers=1)
    # A complete data set needs no fonts any more.
    monkeypatch.setattr(fonts, "SYSTEM_FONTS", tmp_path / "none")
    monkeypatch.setenv("PATH", "")
    assert make_glyphs(out, 51, 32, "all", cache_dir=tmp_path / "no-cache", workers=1).reused


def test_an_interrupted_run_starts_again_without_overwrite(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PowerCutError(Exception):
        pass

    def stop(*_: object) -> None:
        raise PowerCutError

    with monkeypatch.context() as patch:
        patch.setattr("partialfc.data.glyphs.generate._write_closed_set", stop)
        with pytest.raises(PowerCutError):
            make_glyphs(tmp_path / "a", 50, 32, "all", workers=1)
    with pytest.raises(DataError, match="missing"):
        TarDataset(tmp_path / "a")
    report = make_glyphs(tmp_path / "a", 50, 32, "all", workers=1)
    assert digests(report) == digests(make_glyphs(tmp_path / "b", 50, 32, "all", workers=1))


def test_a_folder_with_other_things_is_refused_before_any_work(tiny: None, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        make_glyphs(tmp_path, 50, 32, "all", cache_dir=tmp_path / "nothing-fetched")
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_more_classes_than_the_fonts_have_names_the_limit_and_further_blocks_are_used_before(
    tiny: None, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"at most (\d+)") as raised:
        make_glyphs(tmp_path / "g", 5000, 32, "all", workers=2)
    assert not (tmp_path / "g").exists()
    limit = int(str(raised.value).split("at most ")[1].split(":")[0])
    report = make_glyphs(tmp_path / "g", limit, 32, "all", workers=2)
    assert report.num_classes == limit
    names = [ord(entry["name"]) for entry in TarDataset(tmp_path / "g").classes]
    assert any(codepoint >= 0x5300 for codepoint in names)
    with pytest.raises(ConfigError, match=f"at most {limit}"):
        make_glyphs(tmp_path / "h", limit + 1, 32, "all", workers=2)


def test_arguments_out_of_range_are_refused(tmp_path: Path) -> None:
    for arguments in ((100, 48, "small"), (1, 32, "small"), (100, 32, "huge")):
        with pytest.raises(ConfigError):
            make_glyphs(tmp_path / "g", *arguments)


def test_a_real_font_is_scanned_and_its_blanks_left_out(font_files: dict[str, tuple[FontFile, ...]]) -> None:
    font = font_files["droid"][0]
    mapped = han_codepoints(font)
    assert len(mapped) == 20_902 + 6_582  # URO and extension A, without the compatibility ideographs that it also has
    found = scan(font, np.array([0x20, 0x4E00, 0x4E01, 0x3000], dtype=np.int64))  # two of them are spaces
    assert found.codepoints.tolist() == [0x4E00, 0x4E01]
    assert len(set(found.hashes.tolist())) == 2
    em = em_for(32, float(np.median(scan(font, mapped[:200]).extents)))
    assert 26 <= em <= 34


@pytest.mark.slow
def test_the_quick_start_set_is_of_the_size_that_readme_says(tmp_path: Path) -> None:
    with fonts_or_skip():
        report = make_glyphs(tmp_path / "g", 2000, 32, "small")
    assert (report.num_samples, report.held_out_characters, report.verification_samples) == (16_000, 1000, 9000)
