"""Whole numbers of tokens from tensors against the same from plain lists."""

from __future__ import annotations

import random

import pytest
import torch

from ctxcompress import reference
from ctxcompress.budgets import largest_remainder, reallocate

CASES = 300


def random_shares(draw: random.Random, count: int) -> list[float]:
    """Mild, steep (a softmax of low temperature), or with nothing for some."""
    exponent = draw.choice([1, 1, 8])
    idle = draw.choice([0.0, 0.0, 0.3])
    return [0.0 if draw.random() < idle else draw.random() ** exponent for _ in range(count)]


def whole(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize("limited", [False, True], ids=["free", "limited"])
def test_largest_remainder(limited: bool) -> None:
    draw = random.Random(3)
    for _ in range(CASES):
        count = draw.randint(0, 12)
        shares = random_shares(draw, count)
        low = [draw.randint(0, 6) if limited else 0 for _ in shares]
        high = [least + draw.randint(0, 60) for least in low] if limited else [1000] * count
        budget = sum(low) + draw.randint(0, 200)
        fast = largest_remainder(
            torch.tensor(shares, dtype=torch.float64), budget, minimum_N=whole(low), capacity_N=whole(high)
        )
        slow = reference.largest_remainder(shares, budget, low, high)
        assert fast.tolist() == slow, (shares, budget, low, high)


def test_largest_remainder_with_equal_remainders() -> None:
    draw = random.Random(4)
    for _ in range(CASES):
        # Small whole numbers: many remainders are equal.
        weights = [draw.randint(0, 5) for _ in range(draw.randint(1, 8))]
        budget = draw.randint(0, 40)
        fast = largest_remainder(torch.tensor(weights, dtype=torch.float64), budget)
        assert fast.tolist() == reference.largest_remainder([float(one) for one in weights], budget), (
            weights,
            budget,
        )


@pytest.mark.parametrize("sizes", [[2, 4, 8, 16, 32], [32, 8, 16], [3, 5, 6, 11, 12, 40], [7], range(1, 30)])
def test_reallocate(sizes: list[int]) -> None:
    draw = random.Random(5)
    for _ in range(CASES):
        # Whole weights make ties, of scores and between two sizes.
        kind = draw.choice([lambda: draw.randint(0, 4), draw.random])
        weights = [kind() for _ in range(draw.randint(1, 12))]
        shares = [weight / (sum(weights) or 1) for weight in weights]
        budget = draw.randint(len(shares) * min(sizes), len(shares) * max(sizes) + 20)
        fast, unused = reallocate(torch.tensor(shares, dtype=torch.float64), budget, sizes)
        assert (fast.tolist(), unused) == reference.reallocate(shares, budget, sizes), (shares, budget)
