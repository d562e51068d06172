"""Signals of a language model -> how much each document or token matters. Pure functions, one per equation.

DAST is arXiv 2502.11493, DAC is arXiv 2507.11942. Every function has a slow twin in `reference.py`.

Shapes: N documents, T tokens, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctxcompress.config import Fusion
from ctxcompress.errors import ConfigError, InputError
from ctxcompress.types import Span

# ----------------------------------------------------------------------------------------------------
# documents (DAST)


def mean_nll(nll_T: Tensor, segments: Sequence[Span]) -> Tensor:
    """Local importance P of each segment: the mean NLL of its tokens.

    DAST eq. 3 prints a sum and calls it perplexity; with chunks of one length the mean gives the same eq. 5.

    Args:
        nll_T: (T,) float, nats, >= 0.
        segments: half-open token ranges, none empty.

    Returns:
        (N,) float, nats per token.

    Example:
        >>> mean_nll(torch.tensor([1.0, 2.0, 6.0]), [(0, 2), (2, 3)]).tolist()
        [1.5, 6.0]
    """
    return torch.stack([nll_T[start:stop].mean() for start, stop in segments])


def attention_mass(mass_LHN: Tensor) -> Tensor:
    """Global importance A of each document: its share of the attention that all documents receive.

    DAST eq. 4 with the index range mended (each document's own tokens) and the mass outside documents left
    out.

    Args:
        mass_LHN: (L, H, N) float, >= 0; softmax attention summed over each document's tokens.

    Returns:
        (N,) float; sums to 1; uniform if no attention reached any document.
    """
    mass_N = mass_LHN.mean(dim=(0, 1))
    total = mass_N.sum()
    return mass_N / total if total > 0 else torch.full_like(mass_N, 1 / max(len(mass_N), 1))


def importance(
    attention_N: Tensor, nll_N: Tensor, *, alpha: float = 0.5, ppl_sign: int = -1, nll_scale: str = "sum"
) -> Tensor:
    """Score S = alpha * A + ppl_sign * (1 - alpha) * P / scale of each document.

    DAST eq. 5 before its softmax; `ppl_sign=-1` as printed.

    Args:
        attention_N: (N,) float; A, sums to 1.
        nll_N: (N,) float, nats >= 0; P.
        alpha: weight of attention, in [0, 1].
        ppl_sign: -1 favours predictable documents, +1 surprising ones.
        nll_scale: "sum" divides P by its sum as printed; "mean" by its mean ("scaled by N" in the text).

    Returns:
        (N,) float.

    Raises:
        ConfigError: another `nll_scale`.

    Example:
        >>> importance(torch.tensor([0.75, 0.25]), torch.tensor([1.0, 3.0])).tolist()
        [0.25, -0.25]
    """
    if nll_scale not in ("sum", "mean"):
        raise ConfigError(f"nll_scale must be 'sum' or 'mean', got {nll_scale!r}")
    scale = nll_N.sum() if nll_scale == "sum" else nll_N.mean()
    local_N = nll_N / scale if scale > 0 else torch.zeros_like(nll_N)
    return alpha * attention_N + ppl_sign * (1 - alpha) * local_N


def shares(scores_N: Tensor, temperature: float = 1.0) -> Tensor:
    """Softmax over documents: what part of the budget each deserves.

    DAST eq. 5. At temperature 1 the printed scores differ so little that every document ends up with the same
    size; 1/N is the least change that lets them differ.

    Args:
        scores_N: (N,) float, finite.
        temperature: > 0; lower is sharper.

    Returns:
        (N,) float64; sums to 1.

    Raises:
        InputError: a score is NaN or infinite.

    Example:
        >>> shares(torch.tensor([0.0, 0.0])).tolist()
        [0.5, 0.5]
    """
    if not torch.isfinite(scores_N).all():
        raise InputError(
            f"scores must be finite, got {scores_N.tolist()}; the model's attention may hold NaN"
        )
    return (scores_N.double() / temperature).softmax(dim=0)


def attention_evidence(
    question_LHN: Tensor, baseline_LHN: Tensor, heads: Sequence[tuple[int, int]]
) -> Tensor:
    """How much more of the attention each document gets from the question than from one without content.

    Eq. 4 at the chosen heads under the question, minus the same under "N/A" (ours). The baseline is what
    position and attention sinks draw whatever is asked; it drowns the printed signal.

    Args:
        question_LHN: (L, H, N) float, >= 0; mass under the question.
        baseline_LHN: (L, H, N) float, >= 0; mass under the content-free question.
        heads: (layer, head) pairs to read.

    Returns:
        (N,) float in [-1, 1]; sums to 0; 0 means no more than expected.
    """
    layers, numbers = zip(*heads, strict=True)
    question_1KN, baseline_1KN = question_LHN[None, layers, numbers], baseline_LHN[None, layers, numbers]
    return attention_mass(question_1KN) - attention_mass(baseline_1KN)


def standardised(values_N: Tensor) -> Tensor:
    """Values in standard deviations from their mean: any retriever's scores become comparable.

    All equal gives zeros.

    Example:
        >>> standardised(torch.tensor([1.0, 3.0])).tolist()
        [-1.0, 1.0]
    """
    if len(values_N) == 0:
        return values_N
    deviation = values_N.std(correction=0)
    return (values_N - values_N.mean()) / deviation if deviation > 1e-12 else torch.zeros_like(values_N)


# --------------------------------------------------------------------------------------------------------
# tokens (DAC)


def minmax(values_T: Tensor) -> Tensor:
    """Stretch values to [0, 1]; all zeros when they differ by no more than 1e-8.

    Example:
        >>> minmax(torch.tensor([2.0, 4.0, 3.0])).tolist()
        [0.0, 1.0, 0.5]
    """
    if len(values_T) == 0:
        return values_T
    low, high = values_T.min(), values_T.max()
    return (values_T - low) / (high - low) if high - low > 1e-8 else torch.zeros_like(values_T)


def fused(nll_T: Tensor, attention_T: Tensor, *, alpha: float = 0.8, fusion: Fusion = "additive") -> Tensor:
    """Worth M of each token: information and accumulated attention in one number.

    DAC: additive M = (1 - alpha) * minmax(I) + alpha * minmax(s), or multiplicative M = I * s.

    Args:
        nll_T: (T,) float, nats; I.
        attention_T: (T,) float, >= 0; s.
        alpha: weight of attention, in [0, 1]; additive only.
        fusion: "additive" or "multiplicative".

    Returns:
        (T,) float.
    """
    if fusion == "multiplicative":
        return nll_T * attention_T
    return (1 - alpha) * minmax(nll_T) + alpha * minmax(attention_T)


def per_visible_query(attention_T: Tensor) -> Tensor:
    """Accumulated attention per query that could see the token: early tokens are seen by more.

    Example:
        >>> per_visible_query(torch.tensor([6.0, 3.0, 2.0])).tolist()
        [2.0, 1.5, 2.0]
    """
    length = len(attention_T)
    return attention_T / torch.arange(length, 0, -1, dtype=attention_T.dtype, device=attention_T.device)
