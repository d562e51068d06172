"""What holds for every signal: shares are shares, scales are scales, and documents may come in any order."""

from __future__ import annotations

import os
import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxcompress.scores import (
    attention_evidence,
    attention_mass,
    fused,
    importance,
    mean_nll,
    minmax,
    per_visible_query,
    shares,
    standardised,
)

examples = settings(max_examples=int(os.environ.get("CTXCOMPRESS_MAX_EXAMPLES", "50")), deadline=None)

ALPHAS = st.floats(0, 1)
SCORES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20)
SIGNALS = st.lists(st.tuples(st.floats(0, 30), st.floats(0, 500)), max_size=30)
MASSES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))


def numbers(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_mass(layers: int, heads: int, documents: int, seed: int) -> torch.Tensor:
    return torch.rand(layers, heads, documents, generator=torch.Generator().manual_seed(seed))


@examples
@given(SCORES, st.floats(1e-3, 1e3))
def test_shares_sum_to_one_and_keep_the_order(scores: list[float], temperature: float) -> None:
    shares_N = shares(numbers(scores), temperature)
    assert abs(float(shares_N.sum()) - 1) < 1e-12
    ordered_N = shares_N[numbers(scores).argsort()]
    assert (ordered_N.diff() >= 0).all()


@examples
@given(SCORES, st.floats(-100, 100))
def test_shares_do_not_change_when_all_scores_rise_alike(scores: list[float], rise: float) -> None:
    torch.testing.assert_close(
        shares(numbers(scores) + rise), shares(numbers(scores)), rtol=1e-9, atol=1e-300
    )


@examples
@given(MASSES)
def test_attention_mass_is_a_share_whatever_the_scale(mass: tuple[int, int, int, int]) -> None:
    mass_LHN = random_mass(*mass)
    share_N = attention_mass(mass_LHN)
    torch.testing.assert_close(share_N.sum(), torch.tensor(1.0))
    torch.testing.assert_close(attention_mass(mass_LHN * 1e-4), share_N)


@examples
@given(MASSES, st.randoms(use_true_random=False))
def test_permuting_documents_permutes_their_scores(
    mass: tuple[int, int, int, int], shuffle: random.Random
) -> None:
    mass_LHN = random_mass(*mass).double()
    nll_N = mass_LHN[0, 0] * 7
    order = shuffle.sample(range(len(nll_N)), len(nll_N))
    scores_N = importance(attention_mass(mass_LHN), nll_N)
    permuted_N = importance(attention_mass(mass_LHN[..., order]), nll_N[order])
    torch.testing.assert_close(permuted_N, scores_N[order])


@examples
@given(MASSES)
def test_the_question_without_content_is_no_evidence(mass: tuple[int, int, int, int]) -> None:
    layers, heads, _, seed = mass
    mass_LHN = random_mass(*mass)
    every_head = [(layer, head) for layer in range(layers) for head in range(heads)]
    assert (attention_evidence(mass_LHN, mass_LHN, every_head) == 0).all()
    other_LHN = random_mass(*mass[:3], seed + 1)
    evidence_N = attention_evidence(mass_LHN, other_LHN, every_head)
    assert abs(float(evidence_N.sum())) < 1e-5
    torch.testing.assert_close(attention_evidence(other_LHN, mass_LHN, every_head), -evidence_N)


@examples
@given(SCORES)
def test_standardised_values_have_mean_zero_and_deviation_one(scores: list[float]) -> None:
    values_N = standardised(numbers(scores))
    assert abs(float(values_N.mean())) < 1e-6
    assert not values_N.any() or abs(float(values_N.std(correction=0)) - 1) < 1e-6


@examples
@given(SCORES)
def test_minmax_reaches_from_zero_to_one_or_is_zero(scores: list[float]) -> None:
    values_T = minmax(numbers(scores))
    assert (float(values_T.min()), float(values_T.max())) in {(0.0, 1.0), (0.0, 0.0)}
    if max(scores) - min(scores) > 1e-6:
        assert float(values_T.max()) == 1.0


@examples
@given(SIGNALS, ALPHAS)
def test_worth_is_between_zero_and_one(signals: list[tuple[float, float]], alpha: float) -> None:
    nll_T, attention_T = numbers([nll for nll, _ in signals]), numbers([mass for _, mass in signals])
    worth_T = fused(nll_T, attention_T, alpha=alpha)
    assert len(worth_T) == len(signals)
    assert ((worth_T >= 0) & (worth_T <= 1 + 1e-12)).all()
    assert (fused(nll_T, attention_T, fusion="multiplicative") >= 0).all()


@examples
@given(st.integers(1, 50), st.floats(0, 10))
def test_equal_attention_per_query_is_equal_worth(length: int, per_query: float) -> None:
    seen_by_T = torch.arange(length, 0, -1, dtype=torch.float64)
    torch.testing.assert_close(
        per_visible_query(seen_by_T * per_query), torch.full((length,), per_query).double()
    )


@examples
@given(st.lists(st.lists(st.floats(0, 30), min_size=1, max_size=8), min_size=1, max_size=6))
def test_mean_nll_is_the_mean_of_each_segment(segments: list[list[float]]) -> None:
    ends = torch.tensor([len(segment) for segment in segments]).cumsum(0).tolist()
    spans = list(zip([0, *ends], ends, strict=False))
    nll_N = mean_nll(numbers([nll for segment in segments for nll in segment]), spans)
    for segment, nll in zip(segments, nll_N.tolist(), strict=True):
        assert min(segment) - 1e-9 <= nll <= max(segment) + 1e-9
