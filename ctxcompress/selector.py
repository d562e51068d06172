"""Discrete ratio selector: a predicted log2(ratio) and the user's dial -> one ratio of a small set.

Semi-dynamic compression (arXiv 2603.25926), eqs. 1-5: a model copes with a few structures it was trained on,
not with a continuum, so the prediction is quantised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ctxcompress.config import RatioSpace
from ctxcompress.errors import InputError


@dataclass(frozen=True, slots=True)
class Selection:
    """What the selector chose.

    Attributes:
        value: a member of the set: a ratio, or a number of soft tokens.
        saturated: the wish lay beyond the set's end, so turning the dial further that way changes nothing.
    """

    value: int
    saturated: bool


def select_ratio(
    log2_ratio: float,
    ratio_set: Sequence[int],
    *,
    ratio_scale: float = 0.0,
    space: RatioSpace = "log",
) -> Selection:
    """The member of `ratio_set` nearest to 2^(log2_ratio + ratio_scale), eqs. 1-4.

    Args:
        log2_ratio: prediction of the ratio head.
        ratio_set: legal ratios, each >= 1.
        ratio_scale: +1 asks for twice the compression, -1 for half.
        space: distances between logarithms, or "linear" ones as in the authors' code.

    Returns:
        The nearest ratio; ties go to the smaller, which keeps more.

    Raises:
        InputError: an empty set, or a prediction or scale that is not finite.

    Example:
        >>> select_ratio(2.6, (2, 4, 8, 16, 32)), select_ratio(2.6, (2, 4, 8, 16, 32), ratio_scale=3)
        (Selection(value=8, saturated=False), Selection(value=32, saturated=True))
    """
    return _nearest(_wish(log2_ratio, ratio_scale), ratio_set, space)


def select_length(
    log2_ratio: float,
    tokens: int,
    length_set: Sequence[int],
    *,
    ratio_scale: float = 0.0,
    space: RatioSpace = "log",
) -> Selection:
    """The member of `length_set` nearest to tokens / 2^(log2_ratio + ratio_scale), eq. 5.

    Never more soft tokens than the text has tokens, if the set allows it.

    Args:
        log2_ratio: prediction of the ratio head.
        tokens: length of the text, >= 1.
        length_set: legal numbers of soft tokens, each >= 1.
        ratio_scale: +1 asks for twice the compression, -1 for half.
        space: distances between logarithms, or "linear" ones as in the authors' code.

    Returns:
        The nearest length; ties go to the larger, which keeps more.

    Raises:
        InputError: an empty set, or a prediction or scale that is not finite.

    Example:
        >>> select_length(3.0, 500, (16, 32, 64, 128)).value  # 500 / 8 = 62.5
        64
    """
    fitting = [length for length in length_set if length <= tokens] or sorted(length_set)[:1]
    return _nearest(tokens / _wish(log2_ratio, ratio_scale), fitting, space, larger=True)


def _wish(log2_ratio: float, ratio_scale: float) -> float:
    exponent = log2_ratio + ratio_scale
    if not math.isfinite(exponent):
        raise InputError(
            f"the predicted log2 ratio and ratio_scale must be finite, got {log2_ratio} and {ratio_scale}; a "
            "NaN prediction points to a damaged adapter"
        )
    return math.pow(2.0, min(max(exponent, -64.0), 64.0))


def _nearest(wish: float, legal: Sequence[int], space: RatioSpace, larger: bool = False) -> Selection:
    if not legal or min(legal) < 1:
        raise InputError(f"the set must hold whole numbers >= 1, got {list(legal)}")

    def distance(value: int) -> float:
        gap = math.log2(value) - math.log2(wish) if space == "log" else value - wish
        return abs(gap)

    closest = min(map(distance, legal))
    tied = [value for value in legal if distance(value) == closest]
    value = max(tied) if larger else min(tied)
    return Selection(value, not min(legal) <= wish <= max(legal))
