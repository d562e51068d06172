"""The dial that just fits, and relevance times density: by hand, and against every dial there is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctxcompress import InputError
from ctxcompress.allocators import LEAST_SHARE, Request, SemiDynamic, _wishing
from ctxcompress.selector import fitted_scale, select_ratio
from ctxcompress.soft import EncodedText, Features

RATIOS = (1, 2, 4, 8, 16, 32)


def request(tokens: list[int], log2_ratios: list[float]) -> Request:
    nothing = Features(torch.zeros(0, 1), torch.zeros(0, 1), torch.zeros(0))
    return Request(
        [""] * len(tokens),
        [(0,) * count for count in tokens],
        [None] * len(tokens),
        "",
        [EncodedText(nothing, 2, count, log2) for count, log2 in zip(tokens, log2_ratios, strict=True)],
    )


def test_the_gentlest_dial_that_fits() -> None:
    # Predicted 2^1 and 2^3 on 64 tokens each. At dial 0: 32 + 8 = 40. The first steps up are at dials where
    # 1 + s and 3 + s pass a half: 0.5 makes them 4x and 16x, 16 + 4 = 20; 1.5 makes them 8x and 32x, 8 + 2.
    scale, chosen = fitted_scale([1.0, 3.0], [64, 64], RATIOS, 40)
    assert [one.value for one in chosen] == [2, 8]
    # Down the dial the first step is at -0.5 (ties go to the smaller ratio): 64 + 16 = 80 is too much.
    assert scale == pytest.approx(-0.5, abs=1e-6)
    scale, chosen = fitted_scale([1.0, 3.0], [64, 64], RATIOS, 39)
    assert [one.value for one in chosen] == [4, 16]
    assert scale == pytest.approx(0.5, abs=1e-6)
    scale, chosen = fitted_scale([1.0, 3.0], [64, 64], RATIOS, 12)
    assert [one.value for one in chosen] == [8, 32]
    assert scale == pytest.approx(1.5, abs=1e-6)


def test_a_large_budget_keeps_everything_raw() -> None:
    assert [one.value for one in fitted_scale([1.0, 3.0], [64, 64], RATIOS, 128)[1]] == [1, 1]


def test_too_small_a_budget_says_what_works() -> None:
    with pytest.raises(InputError, match=r"budget must be >= 4 tokens"):
        fitted_scale([1.0, 3.0], [64, 64], RATIOS, 3)
    assert sum(64 // one.value for one in fitted_scale([1.0, 3.0], [64, 64], RATIOS, 4)[1]) == 4


@given(
    st.lists(st.tuples(st.floats(-2, 8), st.integers(1, 300)), min_size=1, max_size=8),
    st.integers(1, 800),
)
def test_it_is_the_first_of_all_dials(texts: list[tuple[float, int]], budget: int) -> None:
    log2_ratios, tokens = [log2 for log2, _ in texts], [count for _, count in texts]

    def total(scale: float) -> int:
        chosen = [select_ratio(log2, RATIOS, ratio_scale=scale).value for log2 in log2_ratios]
        return sum(math.ceil(count / ratio) for count, ratio in zip(tokens, chosen, strict=True))

    # A choice changes only where a wish passes a point halfway between two ratios: all totals there are.
    steps = sorted({k + 0.5 - log2 for log2 in log2_ratios for k in range(5)})
    between = [steps[0] - 1, *((a + b) / 2 for a, b in itertools.pairwise(steps)), steps[-1] + 1]
    fitting = [total(scale) for scale in between if total(scale) <= budget]
    if not fitting:
        with pytest.raises(InputError):
            fitted_scale(log2_ratios, tokens, RATIOS, budget)
        return
    scale, chosen = fitted_scale(log2_ratios, tokens, RATIOS, budget)
    got = sum(math.ceil(count / one.value) for count, one in zip(tokens, chosen, strict=True))
    assert got == total(scale) <= budget
    # Rounding may tell equal steps apart, which keeps more; steps nearer than the bisection sees are one.
    if min((b - a for a, b in itertools.pairwise(steps)), default=1.0) > 1e-6:
        assert got >= max(fitting)


def test_density_alone() -> None:
    # 2^1 on 100 tokens asks for 50, 2^3 on 400 for 50: half each.
    worth = SemiDynamic().worth(request([100, 400], [1.0, 3.0]))
    assert worth.log2_ratios_N is not None
    assert worth.log2_ratios_N.tolist() == [1.0, 3.0]
    assert worth.shares_N.tolist() == pytest.approx([0.5, 0.5])


def test_relevance_times_density() -> None:
    # N = 2, shares 0.75 and 0.25: twice 0.75 is 1.5, so 2 / 1.5 = 1.333; twice 0.25 is 0.5, so 8 / 0.5 = 16.
    relevance = torch.tensor([0.75, 0.25], dtype=torch.float64)
    worth = _wishing(request([100, 400], [1.0, 3.0]), torch.log2(2 * relevance))
    assert worth.log2_ratios_N is not None
    assert (2**worth.log2_ratios_N).tolist() == pytest.approx([4 / 3, 16])
    # Asked for: 100 / 1.333 = 75 and 400 / 16 = 25.
    assert worth.shares_N.tolist() == pytest.approx([0.75, 0.25])


def test_no_relevance_asks_for_a_finite_ratio() -> None:
    relevance = torch.tensor([1.0, 0.0], dtype=torch.float64).clamp(min=LEAST_SHARE)
    worth = _wishing(request([10, 10], [2.0, 2.0]), torch.log2(2 * relevance))
    assert worth.log2_ratios_N is not None
    assert torch.isfinite(worth.log2_ratios_N).all()
    assert worth.shares_N.sum() == pytest.approx(1)
