"""Fonts of the glyph data set: found on the machine, or fetched without root."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from partialfc.data.glyphs import apt, fonts
from partialfc.data.glyphs.fonts import DESIGNS, Design, FontFile, default_cache, design_set, fetch_fonts, find_fonts
from partialfc.data.glyphs.generate import make_glyphs
from partialfc.data.glyphs.render import han_codepoints
from partialfc.errors import DataError
from tests.harness.fonts import TINY, fonts_or_skip


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
def test_the_message_of_apt_is_passed_on_and_nothing_half_done_is_left(
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


def test_a_file_that_is_not_a_font_is_named(
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
@pytest.mark.parametrize("index", range(len(DESIGNS)), ids=[design.name for design in DESIGNS])
def test_every_design_of_the_table_exists_and_has_its_characters(index: int) -> None:
    design = DESIGNS[index]
    with fonts_or_skip():
        (files,) = fetch_fonts([design]).values()
    usable = sum(len(han_codepoints(file)) for file in files)
    assert usable >= 3600
