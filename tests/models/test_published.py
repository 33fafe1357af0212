"""Backbones that load published weights: names, shapes and outputs as the original code has them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from partialfc import models
from partialfc.errors import ConfigError
from partialfc.models.iresnet import IBasicBlock
from partialfc.models.mobilefacenet import Bottleneck
from partialfc.models.vit import Block

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "insightface_backbones.json").read_text())
TINY = {"width": 32, "depth": 3, "heads": 4, "patch_size": 8}  # a ViT

OURS = {"mbf": "mobilefacenet", "mbf_large": "mobilefacenet_large"} | {
    f"r{depth}": f"iresnet{depth}" for depth in (18, 34, 50, 100, 200)
}
OURS |= {name: name[:5] for name in FIXTURE if name.startswith("vit")}


@pytest.mark.parametrize("name", FIXTURE)
def test_tensors_have_the_published_names_and_shapes(name: str) -> None:
    for called in (name, OURS[name]):
        with torch.device("meta"):
            backbone = models.build(called, 512, 3, 112)
        assert [[key, list(value.shape)] for key, value in backbone.state_dict().items()] == FIXTURE[name]["state_dict"]
        assert sum(parameter.numel() for parameter in backbone.parameters()) == FIXTURE[name]["parameters"]


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


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if FIXTURE[name]["parameters"] > 30e6 else [])
        for name in FIXTURE
        if "output" in FIXTURE[name]
    ],
)
@torch.no_grad()
def test_outputs_are_those_of_the_original_code(name: str) -> None:
    expected = FIXTURE[name]["output"]
    images = torch.sin(0.01 * torch.arange(2 * 3 * 112 * 112, dtype=torch.float64)).float().view(2, 3, 112, 112)
    embeddings = filled(models.build(name, 512, 3, 112))(images)
    # Made in fp32, the reference of the deepest one differs by 3.5e-4 from the same network in float64.
    tolerance = 1e-3 if name == "r50" else 1e-4
    largest = max(map(abs, expected["first8_of_sample0"]))
    assert embeddings[0, :8].tolist() == pytest.approx(expected["first8_of_sample0"], abs=tolerance * largest)
    assert embeddings.norm(dim=1).tolist() == pytest.approx(expected["norms"], rel=tolerance)
    assert float(torch.cosine_similarity(*embeddings, dim=0)) == pytest.approx(expected["cosine"], abs=tolerance)


@pytest.mark.parametrize("image_size", [32, 50, 112])
@pytest.mark.parametrize("name", ["glyph_net", "iresnet18", "mobilefacenet", "vit_t"])
def test_any_image_size_and_number_of_channels(name: str, image_size: int) -> None:
    backbone = models.build(name, 24, 1, image_size, {"depth": 1} if name == "vit_t" else {})
    assert backbone(torch.randn(2, 1, image_size, image_size)).shape == (2, 24)


def small(name: str, activation_checkpointing: bool = False) -> torch.nn.Module:
    options = {"iresnet18": {"dropout": 0.3}, "vit_t": TINY | {"mask_ratio": 0.4, "drop_path": 0.4}}.get(name)
    torch.manual_seed(1)
    return models.build(name, 16, 3, 32, options, activation_checkpointing)


def recomputed_blocks(backbone: torch.nn.Module) -> list[torch.nn.Module]:
    bottlenecks = [module.layers for module in backbone.modules() if isinstance(module, Bottleneck)]
    return bottlenecks or [module for module in backbone.modules() if isinstance(module, IBasicBlock | Block)]


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet", "vit_t"])
def test_blocks_that_are_computed_twice_give_the_same_gradients_and_count_batches_once(name: str) -> None:
    found = []
    for again in (False, True):
        backbone = small(name, again)
        calls, blocks = [0], recomputed_blocks(backbone)
        for block in blocks:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
        for step in range(2):
            torch.manual_seed(step)  # of dropout, drop path and masking
            output = backbone(torch.randn(4, 3, 32, 32))
            (output * torch.linspace(-1, 1, 16)).sum().backward()
        assert blocks
        assert calls[0] == len(blocks) * 2 * (2 if again else 1)
        gradients = {key: value.grad for key, value in backbone.named_parameters() if value.requires_grad}
        found.append((output.detach(), gradients, backbone.state_dict()))
    (output, gradients, state), (output_again, gradients_again, state_again) = found
    assert torch.equal(output_again, output)
    for key, gradient in gradients.items():
        assert torch.equal(gradients_again[key], gradient), key
    for key, value in state.items():
        assert torch.equal(state_again[key], value), key


@pytest.mark.parametrize("name", ["iresnet18", "vit_t"])
def test_randomness_of_training_is_off_in_evaluation(name: str) -> None:
    backbone, images = small(name), torch.randn(8, 3, 32, 32)
    backbone(images)  # not all statistics at their start
    assert not torch.equal(backbone(images), backbone(images))
    backbone.eval()
    expected = backbone(images)
    assert torch.equal(backbone(images), expected)
    torch.testing.assert_close(backbone(images[:3]), expected[:3], rtol=1e-4, atol=1e-5)


def test_drop_path_keeps_the_mean_and_drops_whole_samples_more_often_in_later_blocks() -> None:
    backbone = models.VisionTransformer(16, 3, 32, **TINY, drop_path=0.4)
    assert [block.drop_path for block in backbone.blocks] == pytest.approx([0, 0.2, 0.4])
    torch.manual_seed(0)
    dropped = backbone.blocks[2]._dropped(torch.ones(20_000, 3, 2))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert torch.equal(dropped.amin((1, 2)), dropped.amax((1, 2))), "a sample as a whole"
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)


def test_masked_tokens_come_out_as_the_learnt_vector_in_their_places() -> None:
    backbone = models.VisionTransformer(16, 3, 32, **TINY, drop_path=0, mask_ratio=0.3)
    seen: dict[str, torch.Tensor] = {}
    backbone.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.update(kept=inputs[0]))
    backbone.norm.register_forward_hook(lambda _, __, output: seen.update(normed=output))
    backbone.feature[0].register_forward_pre_hook(lambda _, inputs: seen.update(features=inputs[0]))
    images = torch.randn(5, 3, 32, 32)
    backbone(images).sum().backward()
    features = seen["features"].view(5, 16, 32)
    masked = (features == backbone.mask_token).all(-1)
    assert masked.sum(1).tolist() == [16 - 11] * 5, "int(16 · 0.7) are kept"
    assert len({tuple(row.tolist()) for row in masked}) > 1, "different ones for each sample"
    assert seen["kept"].shape == (5, 11, 32)
    tokens = backbone.patch_embed(images) + backbone.pos_embed
    for sample in range(5):
        # A token goes through the blocks with its own position, and comes out at its own place.
        entered = [(tokens[sample] == token).all(-1).nonzero().item() for token in seen["kept"][sample]]
        assert sorted(entered) == (~masked[sample]).nonzero().flatten().tolist()
        assert torch.equal(features[sample, entered], seen["normed"][sample])
    assert backbone.mask_token.grad is not None
    assert not models.VisionTransformer(16, 3, 32, **TINY, mask_ratio=0).mask_token.requires_grad, "it has no gradient"


@pytest.mark.parametrize(
    ("name", "image_size", "options", "words"),
    [
        ("vit_t", 8, {}, r"model \(vit_t\): an image of 8 pixels holds no patch of 9; lower patch_size"),
        ("vit_t", 32, {"heads": 7}, "256 is not a multiple of 7"),
        ("vit_t", 32, {"depth": 1.5}, "depth: expected a whole number of 1 or more, got 1.5"),
        ("vit_t", 32, {"patch_size": 0}, "patch_size: expected a whole number of 1 or more, got 0"),
        ("vit_t", 32, {"mask_ratio": 1}, r"mask_ratio must lie in \[0, 1\), got 1"),
        ("vit_t", 32, {"drop_path": -0.1}, r"drop_path must lie in \[0, 1\)"),
        ("vit_t", 32, {"mlp_ratio": 0}, "mlp_ratio must leave a hidden width"),
        ("iresnet18", 32, {"dropout": 1}, r"model \(iresnet18\): dropout must lie in \[0, 1\), got 1"),
    ],
)
def test_impossible_sizes_are_explained(name: str, image_size: int, options: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        models.build(name, 16, 3, image_size, options)
