"""Points of a ROC curve that are kept."""

from __future__ import annotations

import torch

from partialfc.evaluate.verification import Scores


def test_a_curve_keeps_its_ends_and_its_values_when_points_are_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    genuine, impostors = torch.randint(0, 3, (2, 1 << 20), generator=generator)
    scores = Scores(genuine, impostors)
    far, tar = scores.roc()
    points = scores.roc_points(50)
    assert 40 <= len(points["far"]) <= 50
    assert (points["far"][0], points["far"][-1], points["tar"][-1]) == (far[far > 0][0], 1.0, 1.0)
    exact = dict(zip(far.tolist(), tar.tolist(), strict=True))
    assert all(exact[x] == y for x, y in zip(points["far"], points["tar"], strict=True))
    nothing = Scores(scores.genuine, torch.zeros(1 << 20, dtype=torch.int64))
    assert nothing.roc_points() == {"far": [], "tar": []}
