"""The glyph data set: fonts fetched without root, traps of real fonts avoided, the same bytes every time."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from partialfc.data.dataset import TarDataset
from partialfc.data.glyphs import apt, fonts, render
from partialfc.data.glyphs.choice import choose, look_alikes, most_classes, num_held_out, without_placeholders
from partialfc.data.glyphs.fonts import DESIGNS, Design, FontFile, default_cache, design_set, fetch_fonts, find_fonts
from partialfc.data.glyphs.generate import GlyphReport, make_glyphs
from partialfc.data.glyphs.render import Scan, em_for, han_codepoints, scan
from partialfc.errors import ConfigError, DataError

NAMES = ("droid", "maruberi", "vl-gothic", "aoyagi-soseki")  # the lightest packages: 9 MB together
TINY = tuple(design for design in DESIGNS if design.name in NAMES)
BLOCKS = (((0x4E00, 0x52FF),), ((0x5300, 0x54FF),))


@pytest.fixture(scope="session")
def font_files() -> dict[str, tuple[FontFile, ...]]:
    """Four real fonts, from the packages; kept in the user's cache between runs."""
    with fonts_or_skip():
        return fetch_fonts(TINY)


@contextmanager
def fonts_or_skip() -> Iterator[None]:
    """Skip the test if fonts have to be fetched, and this machine cannot."""
    try:
        yield
    except DataError as error:
        for words in ("apt-get and dpkg-deb not found", "Failed to fetch", "resolving"):
            if words in str(error):
                pytest.skip(f"this machine has no fonts, and cannot fetch them: {words}")
        raise


@pytest.fixture
def tiny(font_files: dict[str, tuple[FontFile, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Four designs and a few hundred characters instead of dozens and tens of thousands."""
    monkeypatch.setattr(fonts, "DESIGNS", TINY)
    monkeypatch.setattr(render, "HAN_BLOCKS", BLOCKS)


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
    with pytest.raises(DataError, match=r"another data set \(num_classes=50\)"):
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


def test_an_interrupted_run_is_begun_anew_without_being_asked(
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
    with pytest.raises(DataError, match="not empty"):
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


def test_placeholders_and_blank_glyphs_are_dropped() -> None:
    codepoints = np.arange(10, 20, dtype=np.int64)
    hashes = np.array([7, 7, 7, 7, 8, 8, 8, 1, 2, 3], dtype=np.uint64)  # four alike: a placeholder; three: not
    whole = Scan(codepoints, hashes, np.full(10, 30, dtype=np.uint8))
    parts = [Scan(codepoints[i : i + 5], hashes[i : i + 5], whole.extents[i : i + 5]) for i in (0, 5)]
    assert without_placeholders([whole]).tolist() == without_placeholders(parts).tolist() == [14, 15, 16, 17, 18, 19]


def test_a_real_font_is_scanned_and_its_blanks_left_out(font_files: dict[str, tuple[FontFile, ...]]) -> None:
    font = font_files["droid"][0]
    mapped = han_codepoints(font)
    assert len(mapped) == 20_902 + 6_582  # URO and extension A, without the compatibility ideographs that it also has
    found = scan(font, np.array([0x20, 0x4E00, 0x4E01, 0x3000], dtype=np.int64))  # two of them are spaces
    assert found.codepoints.tolist() == [0x4E00, 0x4E01]
    assert len(set(found.hashes.tolist())) == 2
    em = em_for(32, float(np.median(scan(font, mapped[:200]).extents)))
    assert 26 <= em <= 34


def test_the_choice_holds_out_common_characters_and_trains_on_the_next() -> None:
    everywhere, most, some = (np.arange(a, b, dtype=np.int64) for a, b in ((0, 300), (0, 500), (0, 600)))
    rare = np.arange(1000, 1100, dtype=np.int64)  # in one design only
    in_held_out_font = np.arange(0, 400, 2, dtype=np.int64)
    choice = choose([everywhere, most, some, np.concatenate([some, rare])], [in_held_out_font], 300)
    assert len(choice.held_out) == num_held_out(300) == 150
    assert np.isin(choice.held_out, in_held_out_font).all()
    assert (choice.held_out < 300).all()  # those that all four designs have
    assert len(choice.training) == 300
    assert not np.isin(choice.training, choice.held_out).any()
    assert np.isin(np.setdiff1d(everywhere, choice.held_out), choice.training).all()
    assert choice.training.max() < 500  # three designs at least
    again = choose([everywhere[::-1], most, some, np.concatenate([rare, some])], [in_held_out_font], 300)
    assert again.training.tolist() == choice.training.tolist()


@pytest.mark.parametrize(("characters", "verifiable"), [(0, 0), (50, 50), (101, 101), (500, 20), (9000, 9000)])
def test_the_largest_possible_number_of_classes_is_possible_and_one_more_is_not(
    characters: int, verifiable: int
) -> None:
    possible = most_classes(characters, verifiable)
    design = np.arange(characters, dtype=np.int64)
    if possible:
        assert len(choose([design], [design[:verifiable]], possible).training) == possible
    with pytest.raises(ConfigError, match=f"at most {possible}"):
        choose([design], [design[:verifiable]], possible + 1)


def test_look_alikes_are_found_whatever_their_brightness(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images = rng.random((2000, 64), dtype=np.float32)
    images[1500] = 0.5 * images[3] + 0.2
    images[1999] = images[1100]
    images[7] = 0  # a blank image is like nothing
    assert sorted(look_alikes(images)) == [(3, 1500), (1100, 1999)]


def test_design_sets_grow_and_every_design_counts_once() -> None:
    small, core, everything = (design_set(name) for name in ("small", "core", "all"))
    assert set(small) < set(core) < set(everything) == set(DESIGNS)
    trained = [len([design for design in designs if not design.held_out]) for designs in (small, core, everything)]
    assert trained == [8, 20, 39]
    assert [design.name for design in small if design.held_out] == ["kouzan"]
    assert len({design.name for design in DESIGNS}) == len({design.files for design in DESIGNS}) == len(DESIGNS)
    calligrapher = {design.name for design in DESIGNS if "kouzan" in design.package or "aoyagi" in design.package}
    assert all(design.held_out for design in DESIGNS if design.name in calligrapher)


def test_fonts_come_from_the_users_folder_before_anything_else(
    font_files: dict[str, tuple[FontFile, ...]], tmp_path: Path
) -> None:
    own = tmp_path / "own" / "deep"
    own.mkdir(parents=True)
    shutil.copy(font_files["droid"][0].path, own)
    found = find_fonts(TINY, None, tmp_path / "own")
    assert found["droid"] == (FontFile(own / "DroidSansFallbackFull.ttf", 0),)
    with pytest.raises(DataError, match="not a folder"):
        find_fonts(TINY, None, tmp_path / "nowhere")


def test_installed_fonts_are_used_without_a_download(
    font_files: dict[str, tuple[FontFile, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for files in font_files.values():
        shutil.copy(files[0].path, tmp_path)
    monkeypatch.setattr(fonts, "SYSTEM_FONTS", tmp_path)
    monkeypatch.setenv("PATH", "")
    found = fetch_fonts(TINY, tmp_path / "cache")
    assert {files[0].path.parent for files in found.values()} == {tmp_path}
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def no_fonts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fonts, "SYSTEM_FONTS", tmp_path / "nothing-installed")
    return tmp_path / "cache"


def test_without_apt_the_error_says_what_is_missing_and_what_to_do(
    no_fonts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError) as raised:
        make_glyphs(no_fonts / "out", 100, cache_dir=no_fonts)
    message = str(raised.value)
    assert "9 font packages are missing: fonts-arphic-ukai " in message
    assert "apt-get and dpkg-deb not found on this machine" in message
    assert "apt-get install fonts-arphic-ukai fonts-arphic-uming" in message
    assert "--font-dir DIR" in message
    assert "HanaMinB.ttf" in message
    assert not (no_fonts / "out").exists()


def fake_programs(folder: Path, monkeypatch: pytest.MonkeyPatch, apt_get: str) -> None:
    """Programs named apt-get and dpkg-deb; ``apt_get`` is a shell script that sees the arguments."""
    folder.mkdir()
    for name, script in (("apt-get", apt_get), ("dpkg-deb", 'mkdir -p "$3" && cp "$2" "$3/MTLmr3m.ttf"')):
        (folder / name).write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n{script}\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def maruberi() -> list[Design]:
    return [design for design in DESIGNS if design.name == "maruberi"]


def test_empty_package_lists_are_fetched_into_the_cache_once(
    no_fonts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
case "$*" in
  *Dir::State=*update) exit 0 ;;
  *Dir::State=*download*) echo font > package.deb ;;
  *) echo "E: Unable to locate package" >&2; exit 100 ;;
esac"""
    fake_programs(tmp_path / "bin", monkeypatch, script)
    found = fetch_fonts(maruberi(), no_fonts)
    assert found["maruberi"][0].path == no_fonts / "fonts-motoya-l-maruberi" / "MTLmr3m.ttf"
    calls = (tmp_path / "bin" / "calls").read_text().splitlines()
    assert [call.split()[-1] for call in calls[:3]] == ["fonts-motoya-l-maruberi", "update", "fonts-motoya-l-maruberi"]
    assert f"Dir::State={no_fonts}/.apt/state" in calls[1]
    assert fetch_fonts(maruberi(), no_fonts) == found  # and nothing is fetched again
    assert (tmp_path / "bin" / "calls").read_text().splitlines() == calls


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'E: Unable to locate package' >&2; exit 100", "Unable to locate package"),
        ("exit 0", "left 0 archives"),
        ("case $* in *update) echo 'E: no route to server' >&2; exit 100;; *) exit 100;; esac", "no route to server"),
    ],
)
def test_what_apt_says_is_passed_on_and_nothing_half_done_is_left(
    no_fonts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: str
) -> None:
    fake_programs(tmp_path / "bin", monkeypatch, script)
    with pytest.raises(DataError, match=expected):
        fetch_fonts(maruberi(), no_fonts)
    assert [path.name for path in no_fonts.iterdir() if path.name != ".apt"] == []


def test_a_package_without_the_expected_file_is_named(
    no_fonts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_programs(tmp_path / "bin", monkeypatch, "echo font > package.deb")
    droid = [design for design in DESIGNS if design.name == "droid"]
    with pytest.raises(DataError, match="without the expected files: fonts-droid-fallback"):
        fetch_fonts(droid, no_fonts)


def test_a_file_that_is_no_font_is_named(
    tiny: None, font_files: dict[str, tuple[FontFile, ...]], tmp_path: Path
) -> None:
    (tmp_path / "MTLmr3m.ttf").write_bytes(b"no font")
    with pytest.raises(DataError, match=r"MTLmr3m\.ttf"):
        make_glyphs(tmp_path / "g", 50, 32, "all", font_dir=tmp_path, workers=1)


def test_a_real_package_is_fetched_with_empty_package_lists(
    no_fonts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_options = apt.Apt._options

    def without_lists(self: apt.Apt) -> list[str]:
        empty = ["-o", f"Dir::State::lists={tmp_path}/empty", "-o", f"Dir::Cache={tmp_path}/empty"]
        return own_options(self) + ([] if self._private_lists else empty)

    monkeypatch.setattr(apt.Apt, "_options", without_lists)
    with fonts_or_skip():
        found = fetch_fonts(maruberi(), no_fonts)
    assert len(han_codepoints(found["maruberi"][0])) == 6682
    assert (no_fonts / ".apt" / "state" / "lists").is_dir()


def test_the_cache_is_where_users_expect_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "partialfc" / "fonts"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "partialfc" / "fonts"


@pytest.mark.slow
def test_the_quick_start_set_is_made_within_a_minute(tmp_path: Path) -> None:
    with fonts_or_skip():
        fetch_fonts(design_set("small"))
    started = time.monotonic()
    report = make_glyphs(tmp_path / "g", 2000, 32, "small")
    assert time.monotonic() - started < 60  # 14 s on two idle cores
    assert (report.num_samples, report.held_out_characters, report.verification_samples) == (16_000, 1000, 9000)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(DESIGNS)), ids=[design.name for design in DESIGNS])
def test_every_design_of_the_table_exists_and_has_its_characters(index: int) -> None:
    design = DESIGNS[index]
    with fonts_or_skip():
        (files,) = fetch_fonts([design]).values()
    usable = sum(len(han_codepoints(file)) for file in files)
    assert usable >= 3600
