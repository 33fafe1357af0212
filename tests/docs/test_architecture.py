"""The pages for contributors, compared with the code."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"


@pytest.fixture(scope="module")
def drawing() -> Any:
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "docs" / "draw_architecture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts(path: Path) -> list[str]:
    """Return the words in a drawing."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8"))


def test_the_pictures_match_the_code(drawing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["draw_architecture.py", str(tmp_path)])
    drawing.main()
    for name in ("rooms.svg", "step.svg"):
        assert texts(tmp_path / name) == texts(IMAGES / name), f"run docs/draw_architecture.py: {name} is out of date"


def test_every_package_is_a_room_of_the_picture(drawing: Any) -> None:
    rooms = {name for layer in drawing.layers() for name in layer}
    packages = {path.parent.name for path in (ROOT / "partialfc").glob("*/__init__.py")}
    assert packages <= rooms


def test_the_files_in_the_picture_of_a_step_exist(drawing: Any) -> None:
    for _, file, _ in drawing.STEP:
        assert (ROOT / "partialfc" / file).is_file(), file


@pytest.mark.parametrize(
    "page", [str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))]
)
def test_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|docs|benchmarks|examples|configs|launch)/[\w./-]+?)`", text)
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    for path in [ROOT / name for name in named] + [(ROOT / page).parent / link for link in linked]:
        assert path.exists(), f"{page} names {path.relative_to(ROOT)}"
