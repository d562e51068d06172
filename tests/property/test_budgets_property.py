"""What holds for every allocation, whatever the shares, limits and budget."""

from __future__ import annotations

import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxcompress.budgets import largest_remainder, reallocate

examples = settings(max_examples=int(os.environ.get("CTXCOMPRESS_MAX_EXAMPLES", "100")), deadline=None)

SHARES = st.lists(st.floats(0, 1), max_size=12)
DISTINCT_WEIGHTS = st.lists(st.integers(1, 1000), min_size=2, max_size=12, unique=True)
DOUBLING = [2, 4, 8, 16, 32]
SIZE_SETS = st.sampled_from([DOUBLING, [1], [3, 5], [4, 6, 7, 12, 13, 32], list(range(1, 20))])


def numbers(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], int, list[int], list[int]]:
    """Shares, a budget at or above the minima, minima, capacities."""
    shares = draw(SHARES)
    limits = [sorted(draw(st.tuples(st.integers(0, 50), st.integers(0, 50)))) for _ in shares]
    low, high = [pair[0] for pair in limits], [pair[1] for pair in limits]
    return shares, draw(st.integers(sum(low), sum(low) + 300)), low, high


@examples
@given(problems())
def test_counts_meet_the_budget_exactly_within_their_limits(
    problem: tuple[list[float], int, list[int], list[int]],
) -> None:
    shares, budget, low, high = problem
    counts = largest_remainder(
        numbers(shares),
        budget,
        minimum_N=torch.tensor(low, dtype=torch.int64),
        capacity_N=torch.tensor(high, dtype=torch.int64),
    ).tolist()
    assert sum(counts) == min(budget, sum(high))
    assert all(least <= count <= most for least, count, most in zip(low, counts, high, strict=True))


@examples
@given(SHARES, st.integers(0, 5000))
def test_without_limits_every_document_is_within_one_of_its_quota(shares: list[float], budget: int) -> None:
    counts = largest_remainder(numbers(shares), budget).tolist()
    assert sum(counts) == (budget if shares else 0)
    if sum(shares) > 1e-6:
        for share, count in zip(shares, counts, strict=True):
            assert abs(count - budget * share / sum(shares)) < 1 + 1e-4


@examples
@given(SHARES, st.integers(0, 300), st.integers(0, 5), st.integers(5, 60))
def test_a_higher_share_never_gets_fewer(shares: list[float], spare: int, least: int, most: int) -> None:
    counts = largest_remainder(
        numbers(shares),
        len(shares) * least + spare,
        minimum_N=torch.full((len(shares),), least),
        capacity_N=torch.full((len(shares),), most),
    ).tolist()
    for share, count in zip(shares, counts, strict=True):
        assert all(count >= other for lower, other in zip(shares, counts, strict=True) if lower < share)


@pytest.mark.parametrize(
    ("shares", "budget", "capacity", "expected"),
    [
        # The first is full at 100, and 110 are left for 10 : 1.
        pytest.param([1.0, 1e-8, 1e-9], 210, [100, 1000, 1000], [100, 100, 10], id="1e-9"),
        # The third is full at 5, and 1 is left.
        pytest.param([1e-18, 2e-18, 1.0], 6, [10, 10, 5], [0, 1, 5], id="1e-18"),
        pytest.param([0.0, 1e-100, 1.0], 6, [10, 10, 5], [0, 1, 5], id="1e-100"),
        # Nothing deserves nothing, unless all others are full.
        pytest.param([0.0, 1.0], 6, [10, 5], [1, 5], id="0"),
    ],
)
def test_small_shares_keep_their_proportion(
    shares: list[float], budget: int, capacity: list[int], expected: list[int]
) -> None:
    assert largest_remainder(numbers(shares), budget, capacity_N=torch.tensor(capacity)).tolist() == expected


@pytest.mark.parametrize("unit", [0.1, 1.0, 1e-7, 1e7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_remainders_go_to_the_higher_share(unit: float, dtype: torch.dtype) -> None:
    # 5 of 4 : 3 : 2 : 1 are 2 1.5 1 .5, whatever the unit of the shares and their last bit.
    shares = torch.tensor([4.0, 3, 2, 1], dtype=dtype) * unit
    assert largest_remainder(shares, 5).tolist() == [2, 2, 1, 0]
    assert largest_remainder(shares.flip(0), 5).tolist() == [0, 1, 2, 2]


@examples
@given(DISTINCT_WEIGHTS, st.integers(0, 2000), st.randoms(use_true_random=False))
def test_permuting_documents_permutes_counts(weights: list[int], budget: int, shuffle: random.Random) -> None:
    order = shuffle.sample(range(len(weights)), len(weights))
    # Reordered sums of float shares may differ in the last bit; whole numbers over a power of two do not.
    shares = numbers([weight / 1024 for weight in weights])
    counts = largest_remainder(shares, budget)
    assert largest_remainder(shares[order], budget).tolist() == counts[order].tolist()


@examples
@given(DISTINCT_WEIGHTS, st.integers(0, 2000), st.floats(1e-3, 1e3))
def test_only_proportions_count(weights: list[int], budget: int, factor: float) -> None:
    shares = numbers([float(weight) for weight in weights])
    assert largest_remainder(shares * factor, budget).tolist() == largest_remainder(shares, budget).tolist()


@st.composite
def size_problems(draw: st.DrawFn) -> tuple[list[float], int, list[int]]:
    sizes = draw(SIZE_SETS)
    weights = draw(st.lists(st.integers(0, 20), min_size=1, max_size=12))
    shares = [weight / (sum(weights) or 1) for weight in weights]
    return shares, draw(st.integers(len(shares) * min(sizes), len(shares) * max(sizes) + 40)), sizes


@examples
@given(size_problems())
def test_algorithm_1_gives_legal_sizes_within_the_budget(
    problem: tuple[list[float], int, list[int]],
) -> None:
    shares, budget, sizes = problem
    counts, unused = reallocate(numbers(shares), budget, sizes)
    assert set(counts.tolist()) <= set(sizes)
    assert unused >= 0
    assert int(counts.sum()) + unused == budget
    # Nothing that would still fit is left unused.
    steps = [min((size for size in sizes if size > count), default=None) for count in counts.tolist()]
    assert all(
        step is None or step - count > unused for step, count in zip(steps, counts.tolist(), strict=True)
    )


@examples
@given(st.integers(1, 40), st.sampled_from(DOUBLING))
def test_algorithm_1_with_equal_scores_on_the_grid_is_uniform(count: int, size: int) -> None:
    counts, unused = reallocate(torch.full((count,), 1 / count, dtype=torch.float64), count * size, DOUBLING)
    assert counts.tolist() == [size] * count
    assert unused == 0
