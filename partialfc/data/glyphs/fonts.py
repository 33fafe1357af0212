"""The typeface designs of the glyph data set, and the sources of their files.

A design is a way of drawing characters: many fonts in circulation are copies of one another under other names. Each
design below was compared with every other one (median correlation of 300 characters' bitmaps, scaled to one size): no
two reach 0.85. Left out, since they are too close to a design below:

- Ume Hy/UI/C4 Gothic and UmePlus = Ume Gothic; MS variants = Ume Mincho; Komatuna = Konatu
- WenQuanYi Micro Hei = Droid Sans Fallback; IPA, IPAex and Takao Mincho = IPAmj Mincho; Monapo = IPA Gothic
- AR PL KaitiM (Big5 and GB) and cwTeX Kai = UKai; AR PL Mingti2L = UMing; AR PL SungtiL = BabelStone Han
- M+, MigMix, Migu, Ricty Diminished = VL Gothic; Motoya L Cedar = Motoya L Maruberi; the other YOzFonts = YOzFont
- the Kouzan semi-cursive and cursive fonts and Aoyagi Kouzan T: by the calligrapher of Kouzan, which is held out
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from partialfc.data.glyphs.apt import Apt, PackageError
from partialfc.errors import ConfigError, DataError
from partialfc.tracking.console import Progress, no_progress

SETS = ("small", "core", "all")
SYSTEM_FONTS = Path("/usr/share/fonts")


@dataclass(frozen=True)
class Design:
    """One way to draw the characters.

    ``files`` are (file name, face index in a collection); a character is taken from the first file that has it.
    ``held_out`` designs are never trained on. ``sets`` names the font sets the design belongs to.
    """

    name: str
    package: str
    files: tuple[tuple[str, int], ...]
    style: str
    held_out: bool = False
    sets: frozenset[str] = frozenset({"all"})


@dataclass(frozen=True)
class FontFile:
    """A face of a font file."""

    path: Path
    index: int  # face in a collection

    def digest(self) -> str:
        """Return the file's SHA-256."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _design(
    name: str,
    package: str,
    files: str | tuple[tuple[str, int], ...],
    style: str,
    first_set: str,
    held_out: bool = False,
) -> Design:
    """Make a design of the font set ``first_set`` and of all larger ones."""
    faces = ((files, 0),) if isinstance(files, str) else files
    return Design(name, package, faces, style, held_out, frozenset(SETS[SETS.index(first_set) :]))


DESIGNS: tuple[Design, ...] = (
    _design("wqy-zenhei", "fonts-wqy-zenhei", "wqy-zenhei.ttc", "hei", "small"),
    _design("droid", "fonts-droid-fallback", "DroidSansFallbackFull.ttf", "sans", "small"),
    _design("uming", "fonts-arphic-uming", (("uming.ttc", 2),), "light song", "small"),
    _design("ukai", "fonts-arphic-ukai", (("ukai.ttc", 2),), "kai", "small"),
    _design("hanazono", "fonts-hanazono", (("HanaMinA.ttf", 0), ("HanaMinB.ttf", 0)), "mincho", "small"),
    _design("cwtex-fs", "fonts-cwtex-fs", "cwfs.ttf", "fangsong", "small"),
    _design("cwtex-yen", "fonts-cwtex-yen", "cwyen.ttf", "round", "small"),
    _design("cwtex-heib", "fonts-cwtex-heib", "cwheib.ttf", "bold hei", "small"),
    _design("noto-sans-sc", "fonts-noto-cjk", (("NotoSansCJK-Regular.ttc", 2),), "sans", "core"),
    _design("noto-serif-sc", "fonts-noto-cjk", (("NotoSerifCJK-Regular.ttc", 2),), "serif", "core"),
    _design("tw-kai", "fonts-cns11643-kai", (("TW-Kai-98_1.ttf", 0), ("TW-Kai-Ext-B-98_1.ttf", 0)), "kai", "core"),
    _design("tw-sung", "fonts-cns11643-sung", (("TW-Sung-98_1.ttf", 0), ("TW-Sung-Ext-B-98_1.ttf", 0)), "song", "core"),
    _design("babelstone", "fonts-babelstone-han", "BabelStoneHan.ttf", "song", "core"),
    _design("ipamj", "fonts-ipamj-mincho", "ipamjm.ttf", "mincho", "core"),
    _design("lxgw-wenkai", "fonts-lxgw-wenkai", "LXGWWenKai-Regular.ttf", "hand kai", "core"),
    _design("seto", "fonts-seto", "setofont.ttf", "handwriting", "core"),
    _design("cwtex-ming", "fonts-cwtex-ming", "cwming.ttf", "ming", "core"),
    _design("ume-mincho", "fonts-horai-umefont", "ume-tmo3.ttf", "mincho", "core"),
    _design("ume-gothic", "fonts-horai-umefont", "ume-tgo4.ttf", "gothic", "core"),
    _design("vl-gothic", "fonts-vlgothic", "VL-Gothic-Regular.ttf", "gothic", "core"),
    _design("ipa-gothic", "fonts-ipafont-gothic", "ipag.ttf", "gothic", "all"),
    _design("konatu", "fonts-konatu", "Konatu.ttf", "thin gothic", "all"),
    _design("oradano", "fonts-oradano-mincho-gsrr", "OradanoGSRR.ttf", "old print", "all"),
    _design("dejima", "fonts-dejima-mincho", "dejima-mincho-r227.ttf", "rough mincho", "all"),
    _design("maruberi", "fonts-motoya-l-maruberi", "MTLmr3m.ttf", "round", "all"),
    _design("reggae", "fonts-reggae", "ReggaeOne-Regular.ttf", "display", "all"),
    _design("rocknroll", "fonts-rocknroll", "RocknRollOne-Regular.ttf", "display", "all"),
    _design("yusei-magic", "fonts-yusei-magic", "YuseiMagic-Regular.ttf", "marker", "all"),
    _design("dotgothic", "fonts-dotgothic16", "DotGothic16-Regular.ttf", "pixel gothic", "all"),
    _design("sawarabi-gothic", "fonts-sawarabi-gothic", "sawarabi-gothic-medium.ttf", "gothic", "all"),
    _design("sawarabi-mincho", "fonts-sawarabi-mincho", "sawarabi-mincho-medium.ttf", "mincho", "all"),
    _design("smiley-sans", "fonts-smiley-sans", "SmileySans-Oblique.ttf", "oblique display", "all"),
    _design("yozfont", "fonts-yozvox-yozfont-standard-kana", "YOzRS_.ttf", "pen", "all"),
    _design("un-batang", "fonts-unfonts-core", "UnBatang.ttf", "batang", "all"),
    _design("un-dotum", "fonts-unfonts-core", "UnDotum.ttf", "dotum", "all"),
    _design("un-gungseo", "fonts-unfonts-core", "UnGungseo.ttf", "brush", "all"),
    _design("baekmuk-batang", "fonts-baekmuk", "batang.ttf", "batang", "all"),
    _design("baekmuk-gulim", "fonts-baekmuk", "gulim.ttf", "round", "all"),
    _design("baekmuk-dotum", "fonts-baekmuk", "dotum.ttf", "dotum", "all"),
    _design("kouzan", "fonts-kouzan-mouhitsu", "kouzan-mouhitsu.ttf", "brush", "small", held_out=True),
    _design("aoyagi-soseki", "fonts-aoyagi-soseki", "aoyagi-soseki.ttf", "brush", "core", held_out=True),
    _design("kiloji", "fonts-kiloji", "kiloji.ttf", "handwriting", "core", held_out=True),
    _design("unifont", "fonts-unifont", "unifont.otf", "pixel", "all", held_out=True),
)


def design_set(name: str) -> tuple[Design, ...]:
    """Return the designs of a font set: ``small``, ``core`` or ``all``; training designs first."""
    if name not in SETS:
        raise ConfigError(f"fonts must be one of {', '.join(SETS)}, got {name!r}")
    return tuple(design for design in DESIGNS if name in design.sets)


def default_cache() -> Path:
    """Return ``$XDG_CACHE_HOME/partialfc/fonts``, or ``~/.cache/partialfc/fonts``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "partialfc" / "fonts"


def find_fonts(
    designs: Iterable[Design], cache_dir: Path | None = None, font_dir: Path | None = None
) -> dict[str, tuple[FontFile, ...] | None]:
    """Return the files of each design on this machine: in ``font_dir``, installed, or fetched earlier.

    None for a design with a missing file.
    """
    cache = cache_dir or default_cache()
    if font_dir is not None and not font_dir.is_dir():
        raise DataError(f"font_dir {font_dir} is not a folder")
    own, installed = _files_below(font_dir), _files_below(SYSTEM_FONTS)
    found: dict[str, tuple[FontFile, ...] | None] = {}
    for design in designs:
        fetched = _files_below(cache / design.package)
        paths = [own.get(name) or installed.get(name) or fetched.get(name) for name, _ in design.files]
        faces = zip(paths, design.files, strict=True)
        files = tuple(FontFile(path, index) for path, (_, index) in faces if path is not None)
        found[design.name] = files if len(files) == len(design.files) else None
    return found


def _files_below(folder: Path | None) -> dict[str, Path]:
    if folder is None:
        return {}
    found: dict[str, Path] = {}
    for parent, folders, names in os.walk(folder):
        folders.sort()  # the choice between two files of one name must not depend on the file system
        for name in names:
            path = Path(parent) / name
            if name not in found and path.is_file():  # not a dangling link
                found[name] = path
    return found


def fetch_fonts(
    designs: Sequence[Design],
    cache_dir: Path | None = None,
    font_dir: Path | None = None,
    progress: Progress = no_progress,
) -> dict[str, tuple[FontFile, ...]]:
    """Return the font files of each design by name; fetch missing ones from the distribution's packages.

    Raises:
        DataError: a package cannot be fetched; the message says which, why, and what to do.
    """
    cache = cache_dir or default_cache()
    found = find_fonts(designs, cache, font_dir)
    packages = sorted({design.package for design in designs if found[design.name] is None})
    if packages:
        problems = _unpack_all(Apt(cache), packages, progress)
        found = find_fonts(designs, cache, font_dir)
        missing = [design for design in designs if found[design.name] is None]
        if missing:
            raise DataError(_explain(missing, problems, cache))
    return {name: files for name, files in found.items() if files is not None}


def _unpack_all(apt: Apt, packages: list[str], progress: Progress) -> dict[str, str]:
    problems: dict[str, str] = {}
    with progress("fetching font packages", len(packages)) as advance:
        for package in packages:
            try:
                apt.unpack(package)
            except (PackageError, OSError) as error:
                problems[package] = str(error)
            advance(1, package)
    return problems


def _explain(missing: list[Design], problems: dict[str, str], cache: Path) -> str:
    packages = sorted({design.package for design in missing})
    reasons = dict.fromkeys(problems.values())  # often one reason for all
    lines = [f"{len(packages)} font packages are missing: {' '.join(packages)}"]
    lines += [f"  {reason}" for reason in list(reasons)[:5]]
    damaged = [package for package in packages if package not in problems]
    if damaged:
        lines.append(f"  unpacked in {cache}, but without the expected files: {' '.join(damaged)}; remove them there")
    names = " ".join(name for design in missing for name, _ in design.files)
    lines += [
        "Do one of the following:",
        f"  - install them:  apt-get update && apt-get install {' '.join(packages)}",
        f"  - put the font files into a folder, and pass it with --font-dir DIR:  {names}",
    ]
    if any("small" not in design.sets for design in missing):
        lines.append("  - if this release of the distribution lacks some of them, use the smaller set: --fonts small")
    return "\n".join(lines)
