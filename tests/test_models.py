"""Backbones that load published weights: names, shapes and outputs as the original code has them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from partialfc import models

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "insightface_backbones.json").read_text())
NAMES = {"r18": "iresnet18", "r34": "iresnet34", "r50": "iresnet50", "r100": "iresnet100", "r200": "iresnet200"}


@pytest.mark.parametrize("name", NAMES)
def test_tensors_have_the_published_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        backbone = models.BY_NAME[NAMES[name]](512, 3, 112)
    assert [[key, list(value.shape)] for key, value in backbone.state_dict().items()] == FIXTURE[name]["state_dict"]


def filled(backbone: torch.nn.Module) -> torch.nn.Module:
    """With the deterministic values that the reference outputs were made with."""
    state = backbone.state_dict()
    for number, (name, tensor) in enumerate(state.items()):
        if not tensor.is_floating_point():
            continue
        index = torch.arange(tensor.numel(), dtype=torch.float64) % 9973
        value = torch.sin(0.37 * number + 1.3 * index).view(tensor.shape)
        if name.endswith("running_var"):
            value = 1 + 0.2 * value
        elif name.endswith("running_mean"):
            value = 0.1 * value
        elif tensor.dim() >= 2:
            value = value * math.sqrt(0.5 / tensor[0].numel())
        elif name.endswith("weight"):
            value = 1 + 0.1 * value
        else:
            value = 0.1 * value
        tensor.copy_(value)
    backbone.load_state_dict(state)
    return backbone.eval()


@pytest.mark.parametrize("name", [name for name in NAMES if "output" in FIXTURE[name]])
@torch.no_grad()
def test_outputs_are_those_of_the_original_code(name: str) -> None:
    expected = FIXTURE[name]["output"]
    images = torch.sin(0.01 * torch.arange(2 * 3 * 112 * 112, dtype=torch.float64)).float().view(2, 3, 112, 112)
    embeddings = filled(models.BY_NAME[NAMES[name]](512, 3, 112))(images)
    # Made in fp32, the reference of the deepest one differs by 3.5e-4 from the same network in float64.
    tolerance = 1e-3 if name == "r50" else 1e-4
    largest = max(map(abs, expected["first8_of_sample0"]))
    assert embeddings[0, :8].tolist() == pytest.approx(expected["first8_of_sample0"], abs=tolerance * largest)
    assert embeddings.norm(dim=1).tolist() == pytest.approx(expected["norms"], rel=tolerance)
    assert float(torch.cosine_similarity(*embeddings, dim=0)) == pytest.approx(expected["cosine"], abs=tolerance)


@pytest.mark.parametrize("image_size", [32, 50, 112])
@pytest.mark.parametrize("name", ["glyph_net", "iresnet18"])
def test_any_image_size_and_number_of_channels(name: str, image_size: int) -> None:
    backbone = models.BY_NAME[name](24, 1, image_size)
    assert backbone(torch.randn(2, 1, image_size, image_size)).shape == (2, 24)
