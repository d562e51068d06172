"""Discrete ratio selector: a predicted log2(ratio) and the user's dial -> one ratio of a small set.

Semi-dynamic compression (arXiv 2603.25926), eqs. 1-5: a model copes with a few structures it was trained on,
not with a continuum, so the prediction is quantised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ctxcompress.config import RatioSpace
from ctxcompress.errors import InputError
from ctxcompress.pooling import windows

BISECTIONS = 30  # the dial to a billionth of its range: no two wishes lie closer


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


def fitted_scale(
    log2_ratios: Sequence[float],
    tokens: Sequence[int],
    ratio_set: Sequence[int],
    budget: int,
    *,
    space: RatioSpace = "log",
    size: Callable[[int, int], int] = windows,
) -> tuple[float, list[Selection]]:
    """The gentlest dial at which all texts together fit the budget, and what each selects there.

    Found by bisection on the predictions, which needs no model: turning the dial up never keeps more.

    Args:
        log2_ratios: prediction of the ratio head for each text.
        tokens: of each text.
        ratio_set: legal ratios.
        budget: most soft tokens together.
        space: see `select_ratio`.
        size: soft tokens of a text of n tokens at a ratio.

    Returns:
        `ratio_scale` and the selection of each text.

    Raises:
        InputError: even the largest ratio exceeds the budget; says the least that works.

    Example:
        >>> scale, chosen = fitted_scale([1.0, 3.0], [64, 64], (2, 4, 8, 16, 32), 20)  # 4x and 16x: 16 + 4
        >>> round(scale, 2), [selection.value for selection in chosen]
        (0.5, [4, 16])
    """
    least = sum(size(count, max(ratio_set)) for count in tokens)
    if budget < least:
        raise InputError(
            f"budget must be >= {least} tokens, {len(tokens)} texts at the largest ratio {max(ratio_set)}, "
            f"got {budget}; raise it, pass fewer documents, or allow dropping some (allow_drop=True)"
        )

    def selected(scale: float) -> list[Selection]:
        return [
            select_ratio(log2_ratio, ratio_set, ratio_scale=scale, space=space) for log2_ratio in log2_ratios
        ]

    def total(scale: float) -> int:
        chosen = selected(scale)
        return sum(size(count, one.value) for count, one in zip(tokens, chosen, strict=True))

    reach = math.log2(max(ratio_set)) + max(map(abs, log2_ratios), default=0.0) + 1.0
    gentle, strong = -reach, reach
    if total(gentle) <= budget:
        return gentle, selected(gentle)
    for _ in range(BISECTIONS):
        middle = (gentle + strong) / 2
        gentle, strong = (gentle, middle) if total(middle) <= budget else (middle, strong)
    return strong, selected(strong)


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
