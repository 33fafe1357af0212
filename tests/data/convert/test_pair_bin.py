"""InsightFace's ``.bin`` files: genuine ones, every pickle protocol, and hostile ones."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc.data.convert.pair_bin import read_pair_bin
from partialfc.errors import InvalidData

FIXTURES = Path(__file__).parents[2] / "fixtures" / "insightface"
IMAGES = [b"\xff\xd8first\n\x00\xff", b"\x89PNG second", b"\xff\xd8first\n\x00\xff", b"RIFF'\"\\"]
SAME = [True, False]


def _written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["val_py2", "val_lfw_like"])
def test_every_image_and_flag_of_a_genuine_file_is_right(name: str) -> None:
    expected = json.loads((FIXTURES / f"{name}.expected.json").read_text())
    images, same = read_pair_bin(FIXTURES / f"{name}.bin")
    assert [hashlib.sha256(image).hexdigest() for image in images] == [each["sha256"] for each in expected["images"]]
    assert same == expected["issame"]


def _array(image: bytes) -> np.ndarray:
    return np.frombuffer(image, np.uint8)


ENTRIES: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "bytearray": bytearray,
    "read-only array": _array,
    "array": lambda image: _array(image).copy(),
    "column": lambda image: _array(image).copy().reshape(-1, 1),  # of older OpenCV
}
FLAGS: dict[str, Callable[[list[bool]], Any]] = {
    "list": list,
    "array": np.array,
    "numpy scalars": lambda same: list(np.array(same)),
    "integers": lambda same: np.array(same).astype(np.int64),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("old_numpy", [False, True])
def test_every_protocol_and_kind_of_entry_is_read(tmp_path: Path, protocol: int, old_numpy: bool) -> None:
    for entry in ENTRIES.values():
        for flags in FLAGS.values():
            for container in (tuple, list):
                content = pickle.dumps(container(([entry(image) for image in IMAGES], flags(SAME))), protocol)
                if old_numpy:  # names of the modules before numpy 2
                    content = content.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
                    content = content.replace(b"\x8c\x13numpy._core.numeric", b"\x8c\x12numpy.core.numeric")
                    content = content.replace(b"numpy._core.", b"numpy.core.")
                assert read_pair_bin(_written(tmp_path, content)) == (IMAGES, SAME)


def test_an_array_of_objects_and_the_texts_of_python_2_are_read(tmp_path: Path) -> None:
    objects = np.empty(4, object)
    objects[:] = IMAGES
    assert read_pair_bin(_written(tmp_path, pickle.dumps((objects, SAME)))) == (IMAGES, SAME)
    escaped = ["".join(rf"\x{byte:02x}" for byte in image) for image in IMAGES]
    python2 = "((lp0\n" + "".join(f"S'{image}'\na" for image in escaped) + "(lp1\nI01\naI00\natp2\n."
    assert read_pair_bin(_written(tmp_path, python2.encode())) == (IMAGES, SAME)
    short = b"".join(b"U" + bytes([len(image)]) + image for image in IMAGES)
    long = b"".join(b"T" + struct.pack("<i", len(image)) + image for image in IMAGES)
    for strings in (short, long):
        assert read_pair_bin(_written(tmp_path, b"\x80\x02](" + strings + b"e](\x88\x89e\x86.")) == (IMAGES, SAME)


class _Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch owned",), "posix.system"),
        (eval, ("1",), "eval"),
        (getattr, ((), "__class__"), "getattr"),
        (np.load, ("x",), "numpy.load"),
        (np.zeros, (10**6,), "numpy.zeros"),
    ],
)
def test_a_hostile_pickle_is_refused_with_the_name_it_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int, function: Any, arguments: Any, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps(([_Calls(function, *arguments)] * 2, [True]), protocol)
    with pytest.raises(InvalidData, match=rf"x\.bin is not a verification set of InsightFace: it asks for '.*{name}'"):
        read_pair_bin(_written(tmp_path, content))
    assert not (tmp_path / "owned").exists()


HOSTILE = {
    "empty": (b"", "it ends in the middle"),
    "not a pickle": (b"hello", "the instruction b'h'|refers to a value|no place"),
    "a length beyond the file": (b"\x80\x04](\x8e" + b"\xff" * 7 + b"\x7f", "it ends in the middle of a value"),
    "a memo of billions": (b"]r\xff\xff\xff\xff.", r"expected a pair \(images, same\), got a list"),
    "an unknown memo": (b"j\xff\xff\xff\x00.", "refers to a value that is not there"),
    "no mark": (b"]e.", "a mark is missing"),
    "nothing on the stack": (b"a.", "a value is missing"),
    "a value below the mark": (b"](a.", "a value is missing"),
    "a call of a call": (b"cnumpy\nndarray\n(tR.", "called in an unknown way"),
    "attributes of a function": (b"cnumpy\nndarray\n}b.", "no place"),
    "a dictionary": (b"}.", "the instruction b'}' has no place"),
    "an object": (b"c__main__\nX\n)\x81.", "it asks for '__main__.X'"),
    "persistent": (b"Pid\n.", "no place"),
    "an extension": (b"\x82\x01.", "no place"),
    "a list in itself": (b"]q\x00h\x00h\x00\x86a.", r"expected a pair|got a list"),
    "nested without end": (b"(" * 300_000, "more instructions than|it ends"),
    "lists without end": (b"]" * 300_000, "more instructions than images and flags need"),
    "a huge number": (b"I" + b"9" * 10**5 + b"\n.", "a number is damaged"),
    "a flag of 2": (b"](C\x01aC\x01be](K\x02e\x86.", "a flag is a number, not True or False"),
    "a text for an image": (b"](X\x01\x00\x00\x00aC\x01be](\x88e\x86.", "image 0 is a text, not encoded bytes"),
    "an odd image": (b"](C\x01aC\x01bC\x01ce](\x88e\x86.", "expected 2 images a pair, got 3 images and 1 pairs"),
    "no pairs": (b"]]\x86.", "expected 2 images a pair, got 0 images and 0 pairs"),
}


@pytest.mark.parametrize(("content", "words"), HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_set_of_images_is_refused_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(InvalidData, match=words) as refused:
        read_pair_bin(_written(tmp_path, content))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_text_repeated_by_the_memo_is_not_encoded_again_and_again(tmp_path: Path) -> None:
    text = b"X" + struct.pack("<I", 10**5) + b"a" * 10**5 + b"q\x01" + b"X\x06\x00\x00\x00latin1q\x02"
    call = b"h\x00h\x01h\x02\x86R"
    with pytest.raises(InvalidData, match="it encodes more text than it holds"):
        read_pair_bin(_written(tmp_path, b"](c_codecs\nencode\nq\x00" + text + call * 1000 + b"e]\x86."))


@settings(max_examples=50)
@given(st.data())
def test_a_damaged_file_is_refused_or_read_without_another_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    source = [(IMAGES, SAME), ([_array(image) for image in IMAGES], np.array(SAME))][data.draw(st.integers(0, 1))]
    content = bytearray(pickle.dumps(source, data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    with suppress(InvalidData):
        images, same = read_pair_bin(_written(tmp_path_factory.mktemp("bin"), bytes(content)))
        assert len(images) == 2 * len(same)
        assert all(len(image) <= len(content) for image in images)
