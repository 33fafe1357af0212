"""The tests' own rules."""

from __future__ import annotations

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_test_modules_import_nothing_from_each_other() -> None:
    modules = sorted(HERE.rglob("test_*.py"))
    assert len(modules) > 30
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            own = [name for name in names if name.partition(".")[0] == "tests"]
            assert all(name.startswith("tests.harness") for name in own), f"{module}: {own}"


def test_a_room_of_tests_is_a_room_of_the_package() -> None:
    package = {path.name for path in (HERE.parent / "partialfc").iterdir() if path.is_dir()}
    others = {"harness", "fixtures", "docs", "examples", "benchmarks"}
    rooms = {path.name for path in HERE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert rooms - others <= package


def test_pytest_looks_into_every_room(pytestconfig: pytest.Config) -> None:
    ignored = pytestconfig.getini("norecursedirs")  # its default holds "build"
    assert not [room.parent for room in HERE.rglob("test_*.py") if any(fnmatch(room.parent.name, p) for p in ignored)]


def test_test_modules_have_different_names() -> None:
    names = [path.name for path in HERE.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names)), "pytest imports modules by name, whatever their folder"


def test_a_test_module_has_at_most_400_lines() -> None:
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in HERE.rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > 400} == {}
