"""Soft tokens on paper: every expected number is worked out in a comment, none is a snapshot."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ctxcompress import reference
from ctxcompress.backbone import splice
from ctxcompress.errors import InputError
from ctxcompress.pooling import pool, windows
from ctxcompress.selector import Selection, select_length, select_ratio
from ctxcompress.soft import Converter, Features

RATIOS = (2, 4, 8, 16, 32)
# Five tokens whose states are (x, 10 x).
STATES = [1.0, 3.0, 8.0, 10.0, 2.0]


def states() -> tuple[Tensor, Tensor]:
    """(5, 2) states and their counts."""
    means_TD = torch.tensor([[value, 10 * value] for value in STATES])
    return means_TD, torch.ones(5)


def firsts(means_GD: Tensor) -> list[float]:
    """First number of each mean; the second must be ten times it."""
    torch.testing.assert_close(means_GD[:, 1], 10 * means_GD[:, 0])
    return means_GD[:, 0].tolist()


# ------------------------------------------------------------------------------------------ P1: pooling


def test_p1_the_last_window_is_the_true_mean_of_what_it_has() -> None:
    # (1 + 3) / 2, (8 + 10) / 2, and 2 alone; the authors' training pads with zeros and would make it 1.
    means_GD, counts_G = pool(*states(), 2)
    assert firsts(means_GD) == [2.0, 9.0, 2.0]
    assert counts_G.tolist() == [2.0, 2.0, 1.0]


def test_p1_means_pool_again_by_the_tokens_behind_them() -> None:
    # Of the windows above in twos: (2 * 2 + 2 * 9) / 4 = 5.5 = (1 + 3 + 8 + 10) / 4, and 2.
    # In threes: (2 * 2 + 2 * 9 + 1 * 2) / 5 = 24 / 5, where the plain mean of means is 13 / 3.
    twos = pool(*states(), 2)
    means_GD, counts_G = pool(*twos, 2)
    assert firsts(means_GD) == [5.5, 2.0]
    assert counts_G.tolist() == [4.0, 1.0]
    means_GD, counts_G = pool(*twos, 3)
    assert firsts(means_GD) == pytest.approx([4.8])
    assert counts_G.tolist() == [5.0]


def test_p1_aligned_to_the_end_the_first_window_is_short() -> None:
    # 1 alone, (3 + 8) / 2, (10 + 2) / 2; again: missing one of four, so 1 alone, then (5.5 * 2 + 6 * 2) / 4.
    ends = pool(*states(), 2, "end")
    assert firsts(ends[0]) == [1.0, 5.5, 6.0]
    assert ends[1].tolist() == [1.0, 2.0, 2.0]
    means_GD, counts_G = pool(*ends, 2, "end")
    assert firsts(means_GD) == [1.0, 5.75]
    assert counts_G.tolist() == [1.0, 4.0]


def test_p1_padding_has_no_part_in_a_mean() -> None:
    # 3 of 5 places are text: (1 + 3) / 2, then 8 of (8, padding), then a window of padding only: 0 tokens.
    counts_BT = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    means_BGD, counts_BG = pool(states()[0].expand(2, 5, 2), counts_BT, 2)
    assert firsts(means_BGD[0]) == [2.0, 8.0, 0.0]
    assert firsts(means_BGD[1]) == [2.0, 9.0, 2.0]
    assert counts_BG.tolist() == [[2.0, 1.0, 0.0], [2.0, 2.0, 1.0]]


def test_p1_one_window_no_window_and_windows_of_one() -> None:
    # (1 + 3 + 8 + 10 + 2) / 5 = 24 / 5.
    assert firsts(pool(*states(), 8)[0]) == pytest.approx([4.8])
    assert firsts(pool(*states(), 1)[0]) == STATES
    means_GD, counts_G = pool(torch.zeros(0, 2), torch.zeros(0), 4)
    assert (means_GD.shape, counts_G.shape) == ((0, 2), (0,))


@pytest.mark.parametrize(
    ("tokens", "soft"), [(0, 0), (1, 1), (8, 1), (9, 2), (511, 64), (512, 64), (513, 65)]
)
def test_p1_soft_tokens_are_counted_up(tokens: int, soft: int) -> None:
    assert windows(tokens, 8) == soft
    assert len(pool(torch.zeros(tokens, 1), torch.ones(tokens), 8)[1]) == soft


def test_p1_a_factor_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="factor >= 1, got 0"):
        pool(*states(), 0)


# ---------------------------------------------------------------------------------- R1: ratio selector


@pytest.mark.parametrize(
    ("space", "thresholds"),
    [
        # Halfway between 2 and 4 is 3, between 4 and 8 is 6, ...
        pytest.param("linear", (3, 6, 12, 24), id="linear"),
        # Halfway between log2 values 1 and 2 is 1.5: 2.83; then 5.66, 11.3, 22.6.
        pytest.param("log", (2**1.5, 2**2.5, 2**3.5, 2**4.5), id="log"),
    ],
)
def test_r1_thresholds(space: str, thresholds: tuple[float, ...]) -> None:
    for step, threshold in enumerate(thresholds):
        below, above = (
            select_ratio(math.log2(threshold * factor), RATIOS, space=space) for factor in (0.999, 1.001)
        )
        assert (below.value, above.value) == (RATIOS[step], RATIOS[step + 1])


def test_r1_the_two_spaces_disagree_between_their_thresholds() -> None:
    # 2.9 lies above 2.83 and below 3.
    assert select_ratio(math.log2(2.9), RATIOS).value == 4
    assert select_ratio(math.log2(2.9), RATIOS, space="linear").value == 2


@pytest.mark.parametrize(("log2_ratio", "value"), [(1.5, 2), (2.5, 4), (3.5, 8), (4.5, 16)])
def test_r1_a_tie_goes_to_the_smaller_ratio(log2_ratio: float, value: int) -> None:
    assert select_ratio(log2_ratio, RATIOS) == Selection(value, saturated=False)
    assert select_ratio(log2_ratio, RATIOS[::-1]) == Selection(value, saturated=False)


def test_r1_a_tie_in_linear_space() -> None:
    # 2^3 = 8 lies midway between 6 and 10; 96 / 2^3 = 12 midway between 8 and 16, and of lengths the larger
    # keeps more.
    assert select_ratio(3.0, (6, 10), space="linear").value == 6
    assert select_length(3.0, 96, (8, 16), space="linear").value == 16


def test_r1_the_dial_doubles_and_halves() -> None:
    # 2^2.2 = 4.6 -> 4; one notch up 9.2 -> 8, one down 2.3 -> 2.
    chosen = [select_ratio(2.2, RATIOS, ratio_scale=scale).value for scale in (-1, 0, 1)]
    assert chosen == [2, 4, 8]


@pytest.mark.parametrize(
    ("log2_ratio", "selection"),
    [
        (5.0, Selection(32, saturated=False)),  # exactly the end
        (5.1, Selection(32, saturated=True)),
        (99999.0, Selection(32, saturated=True)),  # 2^99999 is no float
        (1.0, Selection(2, saturated=False)),
        (0.9, Selection(2, saturated=True)),
        (-99999.0, Selection(2, saturated=True)),
    ],
)
def test_r1_beyond_the_end_the_dial_is_saturated(log2_ratio: float, selection: Selection) -> None:
    assert select_ratio(log2_ratio, RATIOS) == selection
    assert select_ratio(0.0, RATIOS, ratio_scale=log2_ratio) == selection


def test_r1_lengths() -> None:
    # 500 / 2^3 = 62.5 -> 64; one notch up 31.25 -> 32. log ties: 512 / 2^4.5 = 22.6 -> 32 of (16, 32).
    lengths = (16, 32, 64, 128)
    assert select_length(3.0, 500, lengths).value == 64
    assert select_length(3.0, 500, lengths, ratio_scale=1).value == 32
    assert select_length(4.5, 512, lengths).value == 32


def test_r1_never_more_soft_tokens_than_tokens() -> None:
    # 40 / 2^0 = 40 is nearest to 32 anyway; at 2^-2 the wish is 160, but 64 and 128 exceed 40 tokens.
    lengths = (16, 32, 64, 128)
    assert select_length(0.0, 40, lengths) == Selection(32, saturated=True)
    assert select_length(-2.0, 40, lengths) == Selection(32, saturated=True)
    # Three tokens: nothing fits, so the least.
    assert select_length(0.0, 3, lengths) == Selection(16, saturated=True)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_r1_numbers_that_are_none_are_refused(broken: float) -> None:
    for prediction, scale in ((broken, 0.0), (2.0, broken)):
        with pytest.raises(InputError, match="must be finite"):
            select_ratio(prediction, RATIOS, ratio_scale=scale)
        with pytest.raises(InputError, match="must be finite"):
            select_length(prediction, 100, RATIOS, ratio_scale=scale)


@pytest.mark.parametrize("legal", [(), (0, 2)])
def test_r1_a_set_without_whole_numbers_is_refused(legal: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=">= 1"):
        select_ratio(2.0, legal)
    with pytest.raises(InputError, match=">= 1"):
        select_length(2.0, 100, legal)


# --------------------------------------------------------------------------------------- C1: converter

# (3, 4) has rms sqrt((9 + 16) / 2) = 5 / sqrt 2, so it becomes sqrt 2 * (.6, .8) = (.848528, 1.131371).
# gelu(x) = x (1 + erf(x / sqrt 2)) / 2; erf(.6) = .603856, erf(.8) = .742101:
# .848528 * .801928 = .680459, 1.131371 * .871051 = .985481.
SUM, DIFFERENCE = 1.665940, -0.305022


def converter(residual: bool, scale: float = 2.0) -> Converter:
    """Up is the identity; down adds and subtracts."""
    one = Converter(2, 2, 2, scale, residual)
    with torch.no_grad():
        one.up.weight.copy_(torch.eye(2))
        one.down.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return one


def window_of(tokens: int) -> Features:
    return Features(
        torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.5, -0.25]]]), torch.tensor([[float(tokens)]])
    )


def test_c1_the_learned_part() -> None:
    soft_BMD = converter(residual=False)(window_of(4))
    assert soft_BMD[0, 0].tolist() == pytest.approx([2 * SUM, 2 * DIFFERENCE], abs=4e-6)


@pytest.mark.parametrize(("tokens", "words"), [(4, (1.0, -0.5)), (1, (0.5, -0.25)), (0, (0.0, 0.0))])
def test_c1_the_residual_is_the_mean_embedding_times_the_root_of_the_count(
    tokens: int, words: tuple[float, float]
) -> None:
    # sqrt 4 * (.5, -.25) = (1, -.5).
    soft_BMD = converter(residual=True)(window_of(tokens))
    expected = [2 * SUM + words[0], 2 * DIFFERENCE + words[1]]
    assert soft_BMD[0, 0].tolist() == pytest.approx(expected, abs=4e-6)


def test_c1_a_state_of_zeros_is_no_division_by_zero() -> None:
    # rms sqrt(0 + 1e-6): 0 / .001 = 0, and gelu(0) = 0.
    empty = Features(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), torch.zeros(1, 1))
    assert converter(residual=True)(empty).tolist() == [[[0.0, 0.0]]]


def test_c1_eps_is_one_millionth() -> None:
    # (.001, .001): mean square 1e-6, and 1e-6 more: 1 / sqrt 2 = .707107 each; gelu(.707107) =
    # .707107 * (1 + erf(.5)) / 2 = .707107 * .760250 = .537578; down: twice, and 0.
    tiny = Features(torch.full((1, 1, 2), 1e-3), torch.zeros(1, 1, 2), torch.ones(1, 1))
    assert converter(residual=False, scale=1.0)(tiny)[0, 0].tolist() == pytest.approx([1.075156, 0], abs=4e-6)


def test_c1_the_reference_agrees() -> None:
    weights = reference.ConverterWeights([1.0, 1.0], [[1, 0], [0, 1]], [[1, 1], [1, -1]], 2.0)
    soft = reference.convert([3.0, 4.0], weights, [0.5, -0.25], 4)
    assert soft == pytest.approx([2 * SUM + 1, 2 * DIFFERENCE - 0.5], abs=4e-6)


# ------------------------------------------------------------------------------------------ S1: splice


def test_s1_soft_rows_stand_where_their_segment_stands() -> None:
    table = torch.nn.Embedding.from_pretrained(torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]))
    soft_MD = torch.tensor([[7.0, 7.5], [8.0, 8.5]])
    rows_TD = splice([(2, 0), soft_MD, (), (1,), soft_MD[:0]], table)
    assert rows_TD.tolist() == [[4.0, 5.0], [0.0, 1.0], [7.0, 7.5], [8.0, 8.5], [2.0, 3.0]]
