"""The order of samples: a bijection for every size, stable forever, and the same global batch for every world size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc.data.order import BatchOrder, local_slice
from partialfc.data.permutation import epoch_permutation, mix
from partialfc.errors import ConfigError, DataError

REGRESSION_10 = [2, 4, 1, 0, 3, 9, 7, 6, 8, 5]
REGRESSION_1000003 = [263121, 173281, 570102, 393590, 466311]
REGRESSION_TRILLION = [754149303602, 660341095012, 609822257593, 12657090296, 924323373120]
REGRESSION_BATCH = [0, 6]

SEEDS = st.integers(min_value=0, max_value=2**63)


def permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return epoch_permutation(np.arange(num_samples, dtype=np.int64), num_samples, seed, epoch)


@pytest.mark.parametrize("num_samples", range(1, 70))
def test_every_small_epoch_is_a_permutation(num_samples: int) -> None:
    assert sorted(permutation(num_samples, 1, 2).tolist()) == list(range(num_samples))


@given(st.integers(1, 20_000), SEEDS, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_any_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(permutation(num_samples, seed, epoch)), np.arange(num_samples))


@given(st.integers(1, 2**50), SEEDS, st.data())
@settings(max_examples=60, deadline=None)
def test_positions_of_a_huge_epoch_give_distinct_samples_in_range(
    num_samples: int, seed: int, data: st.DataObject
) -> None:
    positions = data.draw(st.sets(st.integers(0, num_samples - 1), min_size=1, max_size=200))
    result = epoch_permutation(np.array(sorted(positions), dtype=np.int64), num_samples, seed, 0)
    assert len(np.unique(result)) == len(positions)
    assert result.min() >= 0
    assert result.max() < num_samples


def test_a_position_means_the_same_sample_whatever_the_other_positions() -> None:
    whole = permutation(1000, 5, 6)
    some = np.array([999, 0, 17, 500], dtype=np.int64)
    assert np.array_equal(epoch_permutation(some, 1000, 5, 6), whole[some])


def test_the_order_never_changes_between_releases() -> None:
    # Resumed runs depend on these values: they must stay.
    assert mix(0) == 0xE220A8397B1DCDAF  # splitmix64's first output from state 0
    assert permutation(10, 0, 0).tolist() == REGRESSION_10
    first = np.arange(5, dtype=np.int64)
    assert epoch_permutation(first, 1_000_003, 42, 7).tolist() == REGRESSION_1000003
    assert epoch_permutation(first, 10**12, 2**63 + 1, 3).tolist() == REGRESSION_TRILLION
    (part,) = BatchOrder(num_samples=10, batch_size=4, last_batch="keep").local_indices(3, 1, 2)
    assert part.tolist() == REGRESSION_BATCH


def test_epochs_and_seeds_shuffle_differently_and_look_random() -> None:
    a, b, c = permutation(10_000, 1, 0), permutation(10_000, 1, 1), permutation(10_000, 2, 0)
    for x, y in ((a, b), (a, c), (b, c), (a, np.arange(10_000))):
        assert (x == y).sum() < 20  # about one fixed point is expected
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.05
    # Each tenth of the samples is spread evenly over each tenth of the epoch: 100 expected, standard deviation 9.
    table = np.histogram2d(np.arange(10_000), a, bins=10)[0]
    assert table.min() > 60
    assert table.max() < 140


def test_small_permutations_are_all_reached_about_equally_often() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(2400):
        order = tuple(permutation(4, seed, 0).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert min(counts.values()) > 20  # 100 expected each


def test_positions_outside_the_epoch_are_refused() -> None:
    for bad in (-1, 10):
        with pytest.raises(ValueError, match="positions must lie in"):
            epoch_permutation(np.array([bad], dtype=np.int64), 10, 0, 0)
    with pytest.raises(ValueError, match="num_samples"):
        epoch_permutation(np.array([], dtype=np.int64), 0, 0, 0)


@given(st.integers(1, 200), st.integers(1, 20))
def test_the_slices_of_all_ranks_cover_the_global_batch_once(batch: int, world_size: int) -> None:
    slices = [local_slice(batch, rank, world_size) for rank in range(world_size)]
    assert [i for start, stop in slices for i in range(start, stop)] == list(range(batch))
    assert max(stop - start for start, stop in slices) == -(-batch // world_size)


RULES = st.sampled_from(["drop", "keep", "wrap"])


@given(st.integers(1, 100), st.integers(1, 40), st.integers(0, 12), st.integers(1, 7), st.integers(1, 5), RULES, SEEDS)
@settings(max_examples=150, deadline=None)
def test_the_global_batch_is_the_same_for_every_world_size(
    num_samples: int, batch: int, step: int, world_size: int, parts: int, rule: Any, seed: int
) -> None:
    batch = min(batch, num_samples) if rule == "drop" else batch
    order = BatchOrder(num_samples=num_samples, batch_size=batch, last_batch=rule, seed=seed)
    (alone,) = order.local_indices(step, 0, 1)
    assert len(alone) == order.batch_samples(step)
    shares = [order.local_indices(step, rank, world_size, parts) for rank in range(world_size)]
    sizes = order.micro_batch_samples(step, parts)
    assert min(sizes) > 0
    assert [sum(map(len, part)) for part in zip(*shares, strict=True)] == sizes
    together = [index for part in zip(*shares, strict=True) for share in part for index in share.tolist()]
    assert together == alone.tolist()


@pytest.mark.parametrize("batch", [1, 3, 7, 10, 23, 64])
@pytest.mark.parametrize("rule", ["drop", "keep", "wrap"])
def test_an_epoch_shows_what_its_rule_says(batch: int, rule: Any) -> None:
    if rule == "drop" and batch == 64:
        return
    num_samples, epoch = 23, 2
    order = BatchOrder(num_samples=num_samples, batch_size=batch, last_batch=rule, seed=9)
    first = epoch * order.steps_per_epoch
    steps = range(first, first + order.steps_per_epoch)
    seen = [index for step in steps for index in order.local_indices(step, 0, 1)[0].tolist()]
    whole = permutation(num_samples, 9, epoch).tolist()
    length = {"drop": 23 // batch * batch, "keep": 23, "wrap": -(-23 // batch) * batch}[rule]
    assert seen == (whole * (1 + length // num_samples))[:length]
    assert order.samples_before(steps.stop) - order.samples_before(first) == order.samples_per_epoch == length
    assert sum(order.batch_samples(step) for step in steps) == length


def test_a_batch_that_no_epoch_fills_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.global_batch_size: 24 samples, and the data set has 23: .*drop"):
        BatchOrder(num_samples=23, batch_size=24)
    with pytest.raises(ConfigError, match="got 0"):
        BatchOrder(num_samples=23, batch_size=0)
    with pytest.raises(DataError, match="no samples"):
        BatchOrder(num_samples=0, batch_size=4, last_batch="keep")


@given(st.integers(10, 200), st.integers(1, 10), st.integers(1, 10), st.integers(0, 60), RULES)
@settings(max_examples=150, deadline=None)
def test_other_batches_go_on_at_the_same_sample(num_samples: int, old: int, new: int, step: int, rule: Any) -> None:
    before = BatchOrder(num_samples=num_samples, batch_size=old, last_batch=rule)
    epoch, batch = before.place(step)
    after = BatchOrder(num_samples=num_samples, batch_size=new, last_batch=rule).continued(step, epoch, batch * old)
    now_epoch, now_batch = after.place(step)
    if now_epoch == epoch:
        assert 0 <= batch * old - now_batch * new < new, "fewer than a batch repeat, and none is left out"
    else:  # what is left of the epoch fills no batch
        assert rule == "drop"
        assert (now_epoch, now_batch) == (epoch + 1, 0)
        assert num_samples - batch * old < new + num_samples % new
    if old == new:
        assert after == before
