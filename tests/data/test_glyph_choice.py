"""The characters of the glyph data set: which are classes, which are held out, and which look alike."""

from __future__ import annotations

import numpy as np
import pytest

from partialfc.data.glyphs.choice import choose, look_alikes, most_classes, num_held_out, without_placeholders
from partialfc.data.glyphs.render import Scan
from partialfc.errors import ConfigError


def test_placeholders_and_blank_glyphs_are_dropped() -> None:
    codepoints = np.arange(10, 20, dtype=np.int64)
    hashes = np.array([7, 7, 7, 7, 8, 8, 8, 1, 2, 3], dtype=np.uint64)  # four alike: a placeholder; three: not
    whole = Scan(codepoints, hashes, np.full(10, 30, dtype=np.uint8))
    parts = [Scan(codepoints[i : i + 5], hashes[i : i + 5], whole.extents[i : i + 5]) for i in (0, 5)]
    assert without_placeholders([whole]).tolist() == without_placeholders(parts).tolist() == [14, 15, 16, 17, 18, 19]


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
