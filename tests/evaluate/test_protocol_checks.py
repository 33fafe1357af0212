"""Protocols are checked at the start; figures take any name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc.errors import InvalidData
from partialfc.evaluate.figures import draw_roc
from partialfc.evaluate.protocol import Protocol, check_protocol, count_pairs, read_protocols
from partialfc.evaluate.runner import describe_results
from partialfc.evaluate.sets import open_set
from partialfc.evaluate.verification import score_pairs
from tests.harness.tasks import write_set

SIDES = {"probe": ["plain"], "gallery": ["plain", "odd"]}


def _write(folder: Path, content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "protocol.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "it names no protocol"),
        ({"look_alikes": []}, "it names no protocol"),
        ([], "expected an object"),
        ("[" * 10**6, "nested too deeply"),
        ({"x": {"probe": "plain", "gallery": ["odd"]}}, "'probe' of 'x' must be a list of designs, got 'plain'"),
        ({"x": {"probe": ["plain"], "galery": ["odd"]}}, "'gallery' of 'x' must be a list of designs, got None"),
        ({"x": {"probe": [], "gallery": ["odd"]}}, r"'probe' of 'x' must be a list of designs, got \[\]"),
        ({"x": {"probe": [["a"] * 10**5], "gallery": ["odd"]}}, "'probe' of 'x' must be a list of designs.{0,99}$"),
        ({"x": SIDES, "look_alikes": [[1, "2"]]}, "look_alikes must hold pairs of class ids"),
        ({"x": SIDES, "look_alikes": [[1, -2]]}, "look_alikes must hold pairs of class ids"),
        ({"x": SIDES, "look_alikes": {"1": 2}}, "look_alikes must be a list"),
        ({"": SIDES}, "name must be 1 to 128 printable characters"),
        ({"a" * 200: SIDES}, "name must be 1 to 128 printable characters"),
        ({"\ud800": SIDES}, r"printable characters, got '\\ud800'"),
        ({"\x1b[2J": SIDES}, r"printable characters, got '\\x1b\[2J'"),
    ],
)
def test_what_is_no_protocol_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(InvalidData, match=words):
        read_protocols(_write(tmp_path, content))


def test_a_protocol_that_cannot_be_read_does_not_turn_its_set_into_another_kind(tmp_path: Path) -> None:
    write_set(tmp_path / "set", 3, 2, seed=1)
    (tmp_path / "set" / "protocol.json").symlink_to("nowhere")
    with pytest.raises(InvalidData, match=r"protocol\.json is not a verification protocol: No such file"):
        open_set(tmp_path / "set")
    (tmp_path / "set" / "protocol.json").unlink()
    os.mkfifo(tmp_path / "set" / "protocol.json")
    with pytest.raises(InvalidData, match="not a regular file"):
        open_set(tmp_path / "set")


@pytest.mark.parametrize(
    ("sides", "classes", "samples", "words"),
    [
        ({"probe": ["plian"], "gallery": ["odd"]}, 3, 4, "unknown name 'plian'; did you mean 'plain'?"),
        ({"probe": ["plain"], "gallery": ["odd", "z"]}, 3, 4, "unknown name 'z'; known are odd, plain"),
        ({"probe": ["odd"], "gallery": ["odd"]}, 3, 1, "protocol 'x' has no genuine pairs"),
        ({"probe": ["plain"], "gallery": ["odd"]}, 1, 4, "protocol 'x' has no impostor pairs"),
    ],
)
def test_a_protocol_that_compares_nothing_is_refused_when_its_set_is_opened(
    tmp_path: Path, sides: Any, classes: int, samples: int, words: str
) -> None:
    write_set(tmp_path / "set", classes, samples, seed=1)
    with pytest.raises(InvalidData, match=words):
        open_set(_write(tmp_path / "set", {"x": sides}))


_DESIGNS = st.sampled_from("abc")


@given(
    st.lists(st.tuples(st.integers(0, 5), _DESIGNS), min_size=2, max_size=25),
    st.frozensets(_DESIGNS, min_size=1),
    st.frozensets(_DESIGNS, min_size=1),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_pairs_are_counted_without_being_formed(
    samples: list[tuple[int, str]],
    probe: frozenset[str],
    gallery: frozenset[str],
    look_alikes: list[tuple[int, int]],
) -> None:
    labels = np.array([label for label, _ in samples], dtype=np.int64)
    designs = [design for _, design in samples]
    protocol = Protocol("x", probe, gallery)
    embeddings = torch.nn.functional.normalize(torch.randn(len(samples), 4))
    scores = score_pairs(embeddings, torch.from_numpy(labels), designs, protocol, look_alikes)
    found = count_pairs(protocol, look_alikes, labels, designs)
    assert found == (int(scores.genuine.sum()), int(scores.impostors.sum()))


def test_a_million_samples_are_checked_without_their_pairs() -> None:
    labels = np.arange(1_000_000, dtype=np.int64) // 2
    designs = ["a", "b"] * 500_000
    protocol = Protocol("x", frozenset("a"), frozenset("b"))
    assert count_pairs(protocol, [], labels, designs) == (500_000, 500_000 * 499_999)
    check_protocol(Path(), protocol, [], labels, designs)


def test_results_say_where_there_is_no_tar() -> None:
    few = {"tar_at_far": {}, "threshold": {}, "genuine_pairs": 3, "impostor_pairs": 12}
    assert describe_results({"few": few, "known": {"accuracy": 0.5, "samples": 2}}) == [
        "few: no TAR: 12 impostor pairs are too few for FAR 0.01",
        "known: accuracy 0.5000",
    ]


@pytest.mark.parametrize("name", ["costs $5", "$x^$", r"$\nothing$", r"\$", "\ud800", "^_{}%&#~"])
def test_a_figure_takes_any_name(tmp_path: Path, name: str) -> None:
    labels = torch.arange(60) // 2
    embeddings = torch.nn.functional.normalize(torch.randn(60, 4))
    scores = score_pairs(embeddings, labels, ["a"] * 60, Protocol(name, frozenset("a"), frozenset("a")))
    draw_roc({name: scores}, tmp_path / "roc.png", name)
    assert (tmp_path / "roc.png").read_bytes()[:4] == b"\x89PNG"
