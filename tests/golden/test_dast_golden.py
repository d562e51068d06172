"""DAST's equations on paper: every expected number is worked out in a comment, none is a snapshot."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ctxcompress.attention import SegmentMass
from ctxcompress.budgets import largest_remainder, reallocate
from ctxcompress.errors import InputError
from ctxcompress.scores import attention_mass, importance, mean_nll, shares

SIZES = [2, 4, 8, 16, 32]  # chunks of 64 tokens at the ratios 32, 16, 8, 4, 2
CHUNKS = [(0, 4), (4, 8), (8, 12), (12, 16)]

# Four chunks of four tokens, by the probability the model gave each token.
PROBABILITIES = [0.5, 0.25, 0.125, 0.5, *[0.9] * 4, 0.1, 0.2, 0.1, 0.2, *[0.5] * 4]
# Four documents of two keys each, one head of size 2, one query.
QUERY = [1.0, 2.0]
KEYS = [[0.0, 0], [1, 0], [0, 1], [1, 1], [2, 1], [1, 2], [0, 0], [-1, 0]]
DOCUMENTS = [(0, 2), (2, 4), (4, 6), (6, 8)]

ATTENTION = [0.10, 0.20, 0.55, 0.15]
NLL = [120.0, 160, 80, 40]  # shares .3 .4 .2 .1


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(values: Tensor, expected: list[float], tolerance: float = 5e-7) -> None:
    """Equal to the decimals printed; 5e-7 is half a unit of the sixth."""
    torch.testing.assert_close(values.double(), double(expected), atol=tolerance, rtol=0)


def nll_of_chunks() -> Tensor:
    return mean_nll(-double(PROBABILITIES).log(), CHUNKS)


def recorded_mass() -> Tensor:
    """(1 layer, 1 head, 4 documents) as the recorder reads it from a layer's queries and keys."""
    recorder = SegmentMass(DOCUMENTS, [1])
    query_BHQD = torch.zeros(1, 1, 8, 2)
    query_BHQD[..., -1, :] = torch.tensor(QUERY)
    recorder.attend(query_BHQD, torch.tensor([[KEYS]]), torch.zeros(1, 1, 8, 2), scaling=1 / math.sqrt(2))
    return recorder.masses[0][:, :, 0]


# -------------------------------------------------------------------------------------------- G1: eq. 3


def test_g1_nll_is_the_mean_over_a_chunk() -> None:
    # -ln .5 = .693147, -ln .25 = 1.386294, -ln .125 = 2.079442, so chunk 1 sums to
    # .693147 + 1.386294 + 2.079442 + .693147 = 4.852030; chunk 2 to 4 * .105361 = .421442;
    # chunk 3 to 2 * 2.302585 + 2 * 1.609438 = 7.824046; chunk 4 to 4 * .693147 = 2.772589.
    nll_N = nll_of_chunks()
    close(nll_N * 4, [4.852030, 0.421442, 7.824046, 2.772589])
    assert float(nll_N.sum() * 4) == pytest.approx(15.870107, abs=5e-7)
    # Perplexity proper: (2 * 4 * 8 * 2) ** .25 = 128 ** .25; 1 / .9; (10 * 5 * 10 * 5) ** .25 = 50 ** .5; 2.
    close(nll_N.exp(), [3.363586, 1.111111, 7.071068, 2.0])


def test_g1_mean_and_printed_sum_have_the_same_shares() -> None:
    # 4.852030 / 15.870107 = .305734, .421442 / 15.870107 = .026556, ...
    close(nll_of_chunks() / nll_of_chunks().sum(), [0.305734, 0.026556, 0.493005, 0.174705])


def test_g1_a_short_last_chunk_is_not_favoured() -> None:
    # The sum would call one token of 2 nats half as surprising as two such tokens.
    assert mean_nll(double([2.0, 2.0, 2.0]), [(0, 2), (2, 3)]).tolist() == [2.0, 2.0]


# -------------------------------------------------------------------------------------------- G2: eq. 4


def test_g2_attention_mass_is_the_softmax_over_each_documents_own_keys() -> None:
    # q k = 0 1 | 2 3 | 4 5 | 0 -1, over sqrt 2 and through softmax:
    # .014661 .029734 | .060304 .122303 | .248045 .503064 | .014661 .007229
    close(recorded_mass()[0, 0], [0.044395, 0.182607, 0.751108, 0.021890])
    close(attention_mass(recorded_mass()), [0.044395, 0.182607, 0.751108, 0.021890])


def test_g2_the_printed_index_range_is_not_what_we_return() -> None:
    # The literal j = i..(i+1)m, from 0 and cut at the end, sums q k over 0..2, 1..4, 2..6, 3..7 = 3 10 14 11.
    products = [sum(q * k for q, k in zip(QUERY, key, strict=True)) for key in KEYS]
    literal = [sum(products[i : (i + 1) * 2 + 1]) for i in range(4)]
    assert literal == [3, 10, 14, 11]
    printed = double(literal) / sum(literal)
    assert (attention_mass(recorded_mass()).double() - printed).abs().max() > 0.1


def test_g2_heads_are_averaged_and_mass_outside_documents_is_left_out() -> None:
    # Head 1 gives .2 and .2 (the rest went elsewhere), head 2 .5 and .1: means .35 and .15, of .5 in all.
    close(attention_mass(double([0.2, 0.2, 0.5, 0.1]).view(1, 2, 2)), [0.7, 0.3])
    # No head looks at any document: nothing tells them apart.
    close(attention_mass(torch.zeros(2, 3, 4)), [0.25] * 4)


# -------------------------------------------------------------------------------------------- G3: eq. 5


@pytest.mark.parametrize(
    ("settings", "temperature", "scores", "softmax", "tokens"),
    [
        pytest.param(
            # .5 * .10 - .5 * .3 = -.1; .5 * .20 - .5 * .4 = -.1; .5 * .55 - .5 * .2 = .175;
            # .5 * .15 - .5 * .1 = .025
            {},
            1.0,
            [-0.1, -0.1, 0.175, 0.025],
            [0.224735, 0.224735, 0.295871, 0.254658],
            [7.1915, 7.1915, 9.4679, 8.1491],
            id="paper",
        ),
        pytest.param(
            # the same scores times 4: -.4 -.4 .7 .1
            {},
            1 / 4,
            [-0.1, -0.1, 0.175, 0.025],
            [0.150311, 0.150311, 0.451558, 0.247820],
            [4.8099, 4.8099, 14.4499, 7.9303],
            id="scaled",
        ),
        pytest.param(
            # P over its mean 100: 1.2 1.6 .8 .4; .5 * .10 - .5 * 1.2 = -.55, ...
            {"nll_scale": "mean"},
            1.0,
            [-0.55, -0.70, -0.125, -0.125],
            [0.203257, 0.174945, 0.310899, 0.310899],
            [6.5042, 5.5982, 9.9488, 9.9488],
            id="nll-over-mean",
        ),
        pytest.param(
            # .5 * .10 + .5 * .3 = .2, ...
            {"ppl_sign": 1},
            1.0,
            [0.2, 0.3, 0.375, 0.125],
            [0.236733, 0.261631, 0.282008, 0.219628],
            [7.5755, 8.3722, 9.0242, 7.0281],
            id="sign-plus",
        ),
        pytest.param(
            {"alpha": 1.0},
            1.0,
            [0.10, 0.20, 0.55, 0.15],
            [0.211651, 0.233911, 0.331935, 0.222503],
            [6.7728, 7.4851, 10.6219, 7.1201],
            id="without-nll",
        ),
        pytest.param(
            {"alpha": 0.0},
            1.0,
            [-0.3, -0.4, -0.2, -0.1],
            [0.236328, 0.213838, 0.261183, 0.288651],
            [7.5625, 6.8428, 8.3578, 9.2368],
            id="without-attention",
        ),
    ],
)
def test_g3_score_softmax_and_tokens(
    settings: dict[str, float],
    temperature: float,
    scores: list[float],
    softmax: list[float],
    tokens: list[float],
) -> None:
    scores_N = importance(double(ATTENTION), double(NLL), **settings)
    close(scores_N, scores)
    shares_N = shares(scores_N, temperature)
    close(shares_N, softmax)
    close(shares_N * 32, tokens, tolerance=5e-5)


# ----------------------------------------------------------------------------------- G4: sizes of any number


def printed_shares(temperature: float) -> Tensor:
    return shares(importance(double(ATTENTION), double(NLL)), temperature)


def test_g4_rounding_meets_the_budget() -> None:
    # 7.1915 7.1915 9.4679 8.1491 -> 7 7 9 8 = 31; the largest remainder is .4679
    assert largest_remainder(printed_shares(1.0), 32).tolist() == [7, 7, 10, 8]
    # 4.8099 4.8099 14.4499 7.9303 -> 4 4 14 7 = 29; the three largest remainders are .9303 .8099 .8099
    assert largest_remainder(printed_shares(1 / 4), 32).tolist() == [5, 5, 14, 8]


def test_g4_what_one_document_cannot_use_goes_to_the_others_in_proportion() -> None:
    # 10 * (.6 .3 .1) = 6 3 1; the first holds 2, and 8 are left for .3 : .1 = 6 : 2.
    counts_N = largest_remainder(double([0.6, 0.3, 0.1]), 10, capacity_N=torch.tensor([2, 9, 9]))
    assert counts_N.tolist() == [2, 6, 2]
    # Everything fits: the budget is not spent for its own sake.
    assert largest_remainder(double([0.6, 0.4]), 10, capacity_N=torch.tensor([2, 3])).tolist() == [2, 3]


def test_g4_a_minimum_is_paid_by_the_others_in_proportion() -> None:
    # 10 * (.6 .3 .1) = 6 3 1, but the last needs 4: 6 are left for .6 : .3 = 4 : 2.
    counts_N = largest_remainder(double([0.6, 0.3, 0.1]), 10, minimum_N=torch.tensor([0, 0, 4]))
    assert counts_N.tolist() == [4, 2, 4]
    with pytest.raises(InputError, match="must be >= 4"):
        largest_remainder(double([0.6, 0.4]), 3, minimum_N=torch.tensor([2, 2]))


def test_g4_ties_go_to_the_earlier_document_and_no_share_at_all_is_equal_shares() -> None:
    assert largest_remainder(double([0.25] * 4), 6).tolist() == [2, 2, 1, 1]
    assert largest_remainder(double([0.0, 0.0, 0.0]), 4).tolist() == [2, 1, 1]
    assert largest_remainder(double([]), 4).tolist() == []
    assert largest_remainder(double([1.0]), 4).tolist() == [4]


# ------------------------------------------------------------------------------- G5 to G10: sizes from a set


def test_g5_printed_temperature_gives_every_document_the_same_size() -> None:
    # 7.19 7.19 9.47 8.15 are all nearest to 8: the allocation has no effect at all.
    counts_N, unused = reallocate(printed_shares(1.0), 32, SIZES)
    assert (counts_N.tolist(), unused) == ([8, 8, 8, 8], 0)
    # 4.81 4.81 14.45 7.93 -> 4 4 16 8
    counts_N, unused = reallocate(printed_shares(1 / 4), 32, SIZES)
    assert (counts_N.tolist(), unused) == ([4, 4, 16, 8], 0)


def test_g6_what_is_left_raises_the_best_that_fits() -> None:
    # 7.2 9.6 24 7.2 -> 8 8 16 8 (24 is as far from 16 as from 32: the smaller), 8 left; the best needs 16,
    # the second 8.
    counts_N, unused = reallocate(double([0.15, 0.20, 0.50, 0.15]), 48, SIZES)
    assert (counts_N.tolist(), unused) == ([8, 16, 16, 8], 0)
    # 11.52 11.52 4.48 4.48 -> 8 8 4 4, 8 left; of equal scores the first takes them.
    counts_N, unused = reallocate(double([0.36, 0.36, 0.14, 0.14]), 32, SIZES)
    assert (counts_N.tolist(), unused) == ([16, 8, 4, 4], 0)


def test_g7_nearest_is_measured_in_tokens() -> None:
    # 11.52 is 3.52 above 8 and 4.48 below 16. As a ratio (64 / 11.52 = 5.56, between 8 and 4) or a logarithm
    # 16 is nearer, and the total of 40 would shrink the last two: 16 8 4 4. The others, 6.83 each, are
    # nearest to 8 by any measure.
    counts_N, unused = reallocate(double([0.36, 0.64 / 3, 0.64 / 3, 0.64 / 3]), 32, SIZES)
    assert (counts_N.tolist(), unused) == ([8, 8, 8, 8], 0)


def test_g8_too_large_a_total_shrinks_the_lowest() -> None:
    # 13.2 12.32 9.68 8.8 -> 16 16 8 8 = 48, 4 too many: the last gives them.
    counts_N, unused = reallocate(double([0.30, 0.28, 0.22, 0.20]), 44, SIZES)
    assert (counts_N.tolist(), unused) == ([16, 16, 8, 4], 0)
    # 6 each is as near to 4 as to 8: 4 4 4 4, and nothing is left; with 7.5 each, 8 8 8 8 = 32 is 2 too many:
    # of equals the last shrinks, and the 2 then left fit nobody.
    assert reallocate(double([0.25] * 4), 24, [4, 8])[0].tolist() == [8, 8, 4, 4]
    counts_N, unused = reallocate(double([0.25] * 4), 30, SIZES)
    assert (counts_N.tolist(), unused) == ([8, 8, 8, 4], 2)


def test_g9_ends_when_nothing_fits() -> None:
    # 18.4 13.8 9.2 4.6 -> 16 16 8 4 = 44; 2 left, and the cheapest step costs 4. The printed loop never ends.
    counts_N, unused = reallocate(double([0.4, 0.3, 0.2, 0.1]), 46, SIZES)
    assert (counts_N.tolist(), unused) == ([16, 16, 8, 4], 2)
    # With 48 the last takes them.
    counts_N, unused = reallocate(double([0.4, 0.3, 0.2, 0.1]), 48, SIZES)
    assert (counts_N.tolist(), unused) == ([16, 16, 8, 8], 0)


def test_g10_equal_scores_off_the_grid() -> None:
    # 10 each -> 8 8 8 8, 8 left: the first.
    counts_N, unused = reallocate(double([0.25] * 4), 40, SIZES)
    assert (counts_N.tolist(), unused) == ([16, 8, 8, 8], 0)


def test_g10_a_budget_below_the_smallest_total_is_refused() -> None:
    with pytest.raises(InputError, match="must be >= 8"):
        reallocate(double([0.25] * 4), 6, SIZES)
    with pytest.raises(InputError, match="sizes"):
        reallocate(double([0.25] * 4), 6, [])


# --------------------------------------------------------------------------------------- G11: the whole chain


@pytest.mark.parametrize(
    ("temperature", "softmax", "rounded", "legal"),
    [
        (1.0, [0.218131, 0.268753, 0.282822, 0.230294], [7, 9, 9, 7], [8, 8, 8, 8]),
        # ratios 64 / 4 8 16 4 = 16 8 4 16
        (1 / 4, [0.135634, 0.312543, 0.383311, 0.168512], [4, 10, 12, 6], [4, 8, 16, 4]),
    ],
    ids=["paper", "scaled"],
)
def test_g11_from_signals_to_tokens(
    temperature: float, softmax: list[float], rounded: list[int], legal: list[int]
) -> None:
    # .5 * .044395 - .5 * .305734 = -.130670, .5 * .182607 - .5 * .026556 = .078026, ...
    scores_N = importance(attention_mass(recorded_mass()).double(), nll_of_chunks())
    close(scores_N, [-0.130670, 0.078026, 0.129052, -0.076408], tolerance=1e-6)
    shares_N = shares(scores_N, temperature)
    close(shares_N, softmax, tolerance=1e-6)
    assert largest_remainder(shares_N, 32).tolist() == rounded
    assert reallocate(shares_N, 32, SIZES)[0].tolist() == legal
