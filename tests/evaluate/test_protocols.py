"""Verification and identification against plain computations over all pairs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from partialfc import DataError, PartialFC, losses
from partialfc.evaluate.embed import embed
from partialfc.evaluate.figures import draw_roc
from partialfc.evaluate.identification import nearest_classes
from partialfc.evaluate.protocol import Protocol, read_protocols
from partialfc.evaluate.verification import Scores, score_pairs
from tests.harness.ranks import Ranks

PROTOCOLS = [
    Protocol("within", frozenset({"a", "b"}), frozenset({"a", "b"})),
    Protocol("across", frozenset({"c"}), frozenset({"a", "b"})),
    Protocol("overlap", frozenset({"a", "c"}), frozenset({"b", "c"})),
    Protocol("none", frozenset({"z"}), frozenset({"a"})),
]
LOOK_ALIKES = [(1, 4), (7, 2)]


def _samples() -> tuple[Tensor, Tensor, list[str]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 30, (600,), generator=generator)
    centers = torch.randn(30, 16, generator=generator)
    embeddings = centers[labels] + 1.2 * torch.randn(600, 16, generator=generator)
    designs = [("a", "b", "c")[i] for i in torch.randint(0, 3, (600,), generator=generator)]
    return torch.nn.functional.normalize(embeddings), labels, designs


def _brute_force(protocol: Protocol) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of genuine and impostor pairs, pair by pair."""
    embeddings, labels, designs = _samples()
    cosines = (embeddings.double() @ embeddings.double().T).tolist()
    genuine, impostors, seen = [], [], set()
    for i in range(600):
        for j in range(600):
            pair = (min(i, j), max(i, j))
            if i == j or designs[i] not in protocol.probe or designs[j] not in protocol.gallery or pair in seen:
                continue
            seen.add(pair)
            a, b = int(labels[i]), int(labels[j])
            if a == b:
                genuine.append(cosines[i][j])
            elif (a, b) not in LOOK_ALIKES and (b, a) not in LOOK_ALIKES:
                impostors.append(cosines[i][j])
    return np.array(genuine), np.array(impostors)


def _score(group: dist.ProcessGroup | None, protocol: Protocol) -> Scores:
    return score_pairs(*_samples(), protocol, LOOK_ALIKES)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.name)
def test_tar_at_far_is_that_of_a_count_over_all_pairs(ranks: Ranks, protocol: Protocol) -> None:
    genuine, impostors = _brute_force(protocol)
    alone = _score(None, protocol)
    for scores in [alone, *ranks.run(4, _score, protocol)]:
        assert int(scores.genuine.sum()) == len(genuine)
        assert int(scores.impostors.sum()) == len(impostors)
        for far in (0.1, 1e-2, 1e-3):
            tar, threshold = scores.tar_at_far(far)
            if len(impostors) * far < 1:
                assert math.isnan(tar)
                continue
            assert (impostors >= threshold).mean() <= far
            assert tar == pytest.approx((genuine >= threshold).mean(), abs=2 / len(genuine))
            allowed = np.sort(impostors)[::-1][math.floor(far * len(impostors))]
            assert threshold == pytest.approx(allowed, abs=1e-5), "the loosest threshold that the FAR allows"


def test_roc_passes_through_the_operating_points(tmp_path: Path) -> None:
    scores = _score(None, PROTOCOLS[0])
    far, tar = scores.roc()
    assert bool((np.diff(far) > 0).all())
    assert bool((np.diff(tar) >= 0).all())
    assert (far[-1], tar[-1]) == (1.0, 1.0)
    for point in (1e-1, 1e-2, 1e-3):
        below = far <= point
        assert tar[below][-1] == pytest.approx(scores.tar_at_far(point)[0], abs=1e-9)
    draw_roc({"within": scores, "none": _score(None, PROTOCOLS[3])}, tmp_path / "roc.png", "test")
    assert (tmp_path / "roc.png").read_bytes()[:4] == b"\x89PNG"


def test_look_alikes_of_classes_that_do_not_occur_leave_nothing_out() -> None:
    embeddings, labels, designs = _samples()
    plain = score_pairs(embeddings, labels, designs, PROTOCOLS[0])
    other = score_pairs(embeddings, labels, designs, PROTOCOLS[0], [(2, 33), (40, 50)])
    assert torch.equal(plain.impostors, other.impostors)


def test_protocols_are_read_and_damaged_ones_refused(tmp_path: Path) -> None:
    file = tmp_path / "protocol.json"
    file.write_text(json.dumps({"x": {"probe": ["a"], "gallery": ["b", "c"]}, "look_alikes": [[1, 2]]}))
    assert read_protocols(tmp_path) == ([Protocol("x", frozenset("a"), frozenset("bc"))], [(1, 2)])
    for text in ("", "[]", "{", '{"x": {"probe": ["a"]}}', '{"x": 3}', '{"look_alikes": [[1]]}'):
        file.write_text(text)
        with pytest.raises(DataError, match=r"protocol\.json is not a verification protocol"):
            read_protocols(tmp_path)


def _identify(group: dist.ProcessGroup, raw: bool, num_classes: int) -> Tensor:
    head = PartialFC(num_classes, 16, losses.Softmax() if raw else losses.ArcFace(), seed=4, process_group=group)
    if head.bias is not None:
        with torch.no_grad():
            start, stop = head.partition.range(dist.get_rank(group))
            head.bias.copy_(torch.linspace(-0.1, 0.1, num_classes)[start:stop])
    return nearest_classes(head, _samples()[0] * 3, classes_per_chunk=7, rows=250)


@pytest.mark.parametrize("raw", [False, True])
def test_nearest_class_over_all_shards_is_the_dense_argmax(ranks: Ranks, raw: bool) -> None:
    for num_classes in (3, 50):
        weight = PartialFC(num_classes, 16, losses.ArcFace(), seed=4).weight.detach()
        logits = _samples()[0] * 3 @ (weight if raw else torch.nn.functional.normalize(weight)).T
        if raw:
            logits += torch.linspace(-0.1, 0.1, num_classes)
        for world_size in (1, 2, 3, 4):
            for found in ranks.run(world_size, _identify, raw, num_classes):
                assert torch.equal(found, logits.argmax(dim=1))


def _embed(group: dist.ProcessGroup) -> tuple[Tensor, bool]:
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    images = torch.arange(40.0).view(10, 1, 2, 2)
    mine = torch.arange(10).tensor_split(world_size)[rank]
    batches = [(part, images[part]) for part in mine.split(2)]
    return embed(network, batches, 10, 3, torch.device("cpu")), network.training


def test_ranks_embed_a_set_together_in_evaluation_mode(ranks: Ranks) -> None:
    found = ranks.run(4, _embed)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)).eval()
    expected = network(torch.arange(40.0).view(10, 1, 2, 2)).detach()
    for embeddings, training in found:
        torch.testing.assert_close(embeddings, expected)
        assert training, "the network's mode is as before"


def test_spread_is_mean_and_deviation_of_the_pairs_cosines() -> None:
    generator = torch.Generator().manual_seed(4)
    embeddings = torch.nn.functional.normalize(torch.randn(40, 6, generator=generator))
    labels = torch.arange(40) % 5
    protocol = Protocol("all", frozenset({"a"}), frozenset({"a"}))
    found = score_pairs(embeddings, labels, ["a"] * 40, protocol).spread()
    cosines, same = embeddings @ embeddings.T, labels[:, None] == labels
    once = torch.ones(40, 40).triu(1).bool()
    for name, pairs in (("genuine", same & once), ("impostor", ~same & once)):
        assert found[f"{name}_cosine"] == pytest.approx(float(cosines[pairs].mean()), abs=1e-5)
        assert found[f"{name}_deviation"] == pytest.approx(float(cosines[pairs].std(correction=0)), abs=1e-5)
