"""Where the figure of an evaluation is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from partialfc.evaluate.figures import draw_roc


@pytest.mark.filterwarnings("error")  # a figure without curves is no reason for one
def test_a_link_in_place_of_a_figure_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "roc.png").symlink_to(tmp_path / "precious")
    draw_roc({}, tmp_path / "roc.png", "title")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "roc.png").read_bytes().startswith(b"\x89PNG")
