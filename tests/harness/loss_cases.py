"""Losses by their descriptions, in the forms that the tests of the head go through."""

from __future__ import annotations

from partialfc import losses
from tests.harness.dense_reference import (
    Spec,
)

LOSSES: dict[str, Spec] = {
    "softmax": {"name": "softmax"},
    "softmax without bias": {"name": "softmax", "bias": False},
    "normface": {"name": "normface", "scale": 32.0},
    "cosface": {"name": "cosface"},
    "arcface": {"name": "arcface"},
    "arcface, straight through": {"name": "arcface", "margin_gradient": "straight_through"},
    "arcface at scale 128": {"name": "arcface", "scale": 128.0},  # exponentials do not fit float32
    "cosface at scale 700": {"name": "cosface", "scale": 700.0},  # nor do their sums fit float64
    "curricularface at scale 512": {"name": "curricularface", "scale": 512.0},
    "combined": {"name": "combined", "m1": 1.2, "m2": 0.3, "m3": 0.1},
    "sphereface": {"name": "sphereface"},
    "a-softmax": {"name": "a_softmax"},
    "a-softmax, bare": {"name": "a_softmax", "margin": 3, "annealing_start": 0.0, "annealing_end": 0.0},
    "sub-center arcface": {"name": "subcenter_arcface"},
    "one sub-center": {"name": "subcenter_arcface", "sub_centers": 1},
    "sub-center mv-am-softmax": {"name": "subcenter", "loss": {"name": "mv_am_softmax"}, "sub_centers": 2},
    "curricularface": {"name": "curricularface"},
    "mv-am-softmax": {"name": "mv_am_softmax"},
    "magface": {"name": "magface"},
    "magface, straight through": {"name": "magface", "margin_gradient": "straight_through"},
    "adaface": {"name": "adaface"},
    "elasticface-arc": {"name": "elastic_arcface", "std": 0.05},
    "elasticface-arc+": {"name": "elastic_arcface", "std": 0.05, "plus": True},
    "elasticface-cos+": {"name": "elastic_cosface", "std": 0.05, "plus": True},
    "circle": {"name": "circle"},
    "uce": {"name": "uce", "negative_weight": 0.7},
    "sub-center uce": {"name": "subcenter", "loss": {"name": "uce"}},
    "focal arcface": {"name": "focal", "loss": {"name": "arcface"}},
    "focal softmax": {"name": "focal", "loss": {"name": "softmax"}, "gamma": 0.5, "alpha": 0.25},
    "focal sub-center curricularface": {
        "name": "focal",
        "loss": {"name": "subcenter", "loss": {"name": "curricularface"}},
    },
    "label smoothing": {"name": "label_smoothing", "loss": {"name": "softmax"}},
    "label smoothing of arcface": {"name": "label_smoothing", "loss": {"name": "arcface"}, "smoothing": 0.3},
    "label smoothing of magface": {"name": "label_smoothing", "loss": {"name": "magface", "scale": 128.0}},
}


def make_loss(spec: Spec) -> losses.Loss:
    """The loss that a description names."""
    options = {key: make_loss(value) if key == "loss" else value for key, value in spec.items() if key != "name"}
    return losses.BY_NAME[spec["name"]](**options)
