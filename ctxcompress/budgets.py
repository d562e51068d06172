"""Shares and a total -> whole numbers of tokens per document.

- `largest_remainder`: any sizes between a minimum and a capacity; meets the budget exactly.
- `reallocate`: DAST's Algorithm 1; sizes from a fixed set, never above the budget.

Shapes: N documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctxcompress.errors import InputError


def largest_remainder(
    shares_N: Tensor, budget: int, *, minimum_N: Tensor | None = None, capacity_N: Tensor | None = None
) -> Tensor:
    """Share `budget` tokens in proportion to `shares_N`, each document between a minimum and a capacity.

    What a document cannot use goes to the others in proportion to their shares. DAST eq. 5 gives the
    proportions; exact totals are ours: rounding each document alone may miss the budget.

    Args:
        shares_N: (N,) float, >= 0, finite; proportions, need not sum to 1; all zero means equal.
        budget: tokens to give, >= the sum of the minima.
        minimum_N: (N,) int; fewest tokens of each document; None is 0.
        capacity_N: (N,) int; most tokens of each document; None is unlimited.

    Returns:
        (N,) int64; sums to min(budget, sum of capacities); a higher share never gets fewer at equal minimum
        and capacity; equal remainders go to the higher share, then to the earlier document.

    Raises:
        InputError: negative, NaN or infinite shares, a minimum above its capacity, or too small a budget.

    Example:
        >>> largest_remainder(torch.tensor([0.5, 0.3, 0.2]), 7).tolist()  # 3.5 2.1 1.4: floors 3 2 1, 1 left
        [4, 2, 1]
    """
    shares_N = shares_N.double()
    if not (torch.isfinite(shares_N).all() and (shares_N >= 0).all()):
        raise InputError(f"shares must be finite and >= 0, got {shares_N.tolist()}")
    count = len(shares_N)
    low_N = torch.zeros(count, dtype=torch.int64) if minimum_N is None else minimum_N.long()
    high_N = torch.full((count,), max(budget, 0)) if capacity_N is None else capacity_N.long()
    if (low_N > high_N).any():
        raise InputError(f"a minimum is above its capacity: {low_N.tolist()} > {high_N.tolist()}")
    if budget < low_N.sum():
        raise InputError(
            f"budget must be >= {int(low_N.sum())}, the least that {count} documents need, got {budget}; "
            "raise it or pass fewer documents"
        )
    budget = min(budget, int(high_N.sum()))
    return _rounded(_filled(shares_N, budget, low_N, high_N), shares_N, budget, high_N)


def _filled(shares_N: Tensor, budget: int, low_N: Tensor, high_N: Tensor) -> Tensor:
    """Water filling: clamp(level * share, low, high) at the level where the amounts sum to `budget`."""
    amounts_N = low_N.double()
    free_N = low_N < high_N
    while free_N.any():
        left = budget - amounts_N[~free_N].sum()
        # Documents worth nothing share equally what all others together cannot hold.
        weights_N = shares_N if shares_N[free_N].sum() > 0 else torch.ones_like(shares_N)
        wanted_N = torch.where(free_N, left * (weights_N / weights_N[free_N].sum()), amounts_N)
        amounts_N = torch.clamp(wanted_N, low_N, high_N)
        excess_N = wanted_N - amounts_N
        if not (free_N & (excess_N != 0)).any():
            break
        # Whoever hits the bound that is violated more stays there, the others share what is left.
        free_N &= ~(excess_N > 0) if excess_N.sum() >= 0 else ~(excess_N < 0)
    return amounts_N


def _rounded(amounts_N: Tensor, shares_N: Tensor, budget: int, high_N: Tensor) -> Tensor:
    """Floor, then one more for the largest remainders until the sum is `budget`."""
    # The nudges keep an amount a hair below a whole number, or below its equal, from being taken for less.
    counts_N = torch.minimum((amounts_N + 1e-9).floor().long(), high_N)
    remainder_N = torch.where(counts_N < high_N, (amounts_N - counts_N).round(decimals=9), -torch.inf)
    order = shares_N.sort(descending=True, stable=True).indices
    order = order[remainder_N[order].sort(descending=True, stable=True).indices]
    counts_N[order[: budget - int(counts_N.sum())]] += 1
    return counts_N


def reallocate(
    shares_N: Tensor, budget: int, sizes: Sequence[int] | Sequence[Sequence[int]]
) -> tuple[Tensor, int]:
    """Give every document one of the legal sizes, as close to its share of `budget` as the total allows.

    DAST Algorithm 1 in a reading that terminates: snap to the nearest size in tokens (ties to the smaller);
    while the total is too large, step the lowest-scored document down; then sweep by score, one step up each
    where it fits, until a sweep changes nothing.

    Args:
        shares_N: (N,) float, >= 0; sums to 1.
        budget: most tokens in total, >= the sum of the smallest sizes.
        sizes: legal sizes, e.g. chunk length / ratio for every ratio of the set; one list for all documents,
            or one for each when they differ in length. 0 lets a document be dropped.

    Returns:
        (N,) int64 sizes, and the tokens of the budget that no step fits; counts + unused = budget.

    Raises:
        InputError: no sizes, or a budget below the smallest total.

    Example:
        >>> reallocate(torch.tensor([0.15, 0.20, 0.50, 0.15]), 48, [2, 4, 8, 16, 32])[0].tolist()
        [8, 16, 16, 8]
    """
    scores = shares_N.double().tolist()
    legal = [sorted(set(own)) for own in _per_document(sizes, len(scores))]
    if any(not own or own[0] < 0 for own in legal):
        raise InputError(f"sizes must be whole numbers >= 0, got {list(sizes)}")
    least = sum(own[0] for own in legal)
    if budget < least:
        raise InputError(
            f"budget must be >= {least} tokens, the smallest sizes of {len(scores)} documents or chunks, got "
            f"{budget}; raise it, pass fewer documents, or allow a smaller size"
        )
    steps = [
        min(range(len(own)), key=lambda step: abs(own[step] - budget * score))
        for own, score in zip(legal, scores, strict=True)
    ]
    spare = budget - sum(own[step] for own, step in zip(legal, steps, strict=True))
    spare = _stepped_down(steps, scores, legal, spare)
    by_score = sorted(range(len(scores)), key=lambda document: -scores[document])
    while (left := _swept_up(steps, by_score, legal, spare)) != spare:
        spare = left
    counts = [own[step] for own, step in zip(legal, steps, strict=True)]
    return torch.tensor(counts, dtype=torch.int64), spare


def _per_document(sizes: Sequence[int] | Sequence[Sequence[int]], count: int) -> list[Sequence[int]]:
    common = [size for size in sizes if isinstance(size, int)]
    own = [size for size in sizes if not isinstance(size, int)]
    return list(own) if own else [common] * count


def _stepped_down(steps: list[int], scores: list[float], legal: list[list[int]], spare: int) -> int:
    """Make the lowest-scored documents smaller, in place, until nothing is overspent."""
    while spare < 0:
        shrinkable = [document for document, step in enumerate(steps) if step > 0]
        lowest = min(shrinkable, key=lambda document: (scores[document], -document))
        spare += legal[lowest][steps[lowest]] - legal[lowest][steps[lowest] - 1]
        steps[lowest] -= 1
    return spare


def _swept_up(steps: list[int], by_score: list[int], legal: list[list[int]], spare: int) -> int:
    """One step up, in place, for every document whose step still fits, best first."""
    for document in by_score:
        own, step = legal[document], steps[document]
        if step + 1 < len(own) and own[step + 1] - own[step] <= spare:
            spare -= own[step + 1] - own[step]
            steps[document] += 1
    return spare
