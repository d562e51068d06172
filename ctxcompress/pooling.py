"""Hidden states -> window means that can be pooled again: one stored copy serves every coarser ratio.

A window's mean is kept with the number of tokens behind it, so the mean of several windows, weighted by these
counts, is the mean of their tokens: pooling 2 -> 8 equals pooling at 8.

Shapes: B batch, M windows (tokens are windows of one), G pooled windows, D hidden.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ctxcompress.config import WindowAlignment
from ctxcompress.errors import InputError


def pool(
    means_BMD: Tensor, counts_BM: Tensor, factor: int, alignment: WindowAlignment = "start"
) -> tuple[Tensor, Tensor]:
    """Mean of every `factor` neighbouring windows, weighted by the tokens in each.

    Feldman & Artzi (arXiv 2510.20797): windows start at the first token, the last one may be short and is the
    true mean of what it has. The leading dimensions are free; padding is windows with count 0 at the end.

    Args:
        means_BMD: (..., M, D) float; token states, or means of an earlier call.
        counts_BM: (..., M) tokens behind each mean; 1 for token states, 0 for padding.
        factor: windows that become one, >= 1.
        alignment: "start", or "end" to let the first window be the short one (without padding only).

    Returns:
        (..., G, D) means and (..., G) counts, G = ceil(M / factor), in the dtypes that came.

    Raises:
        InputError: factor < 1.

    Example:
        >>> import torch
        >>> means, counts = pool(torch.tensor([[1.0], [3.0], [8.0]]), torch.ones(3), 2)
        >>> means.flatten().tolist(), counts.tolist()
        ([2.0, 8.0], [2.0, 1.0])
    """
    if factor < 1:
        raise InputError(f"windows can be pooled by a factor >= 1, got {factor}")
    missing = -means_BMD.shape[-2] % factor
    before, after = (missing, 0) if alignment == "end" else (0, missing)
    counts_BGF = F.pad(counts_BM, (before, after)).unflatten(-1, (-1, factor))
    sums_BGFD = F.pad(means_BMD, (0, 0, before, after)).unflatten(-2, (-1, factor)) * counts_BGF[..., None]
    counts_BG = counts_BGF.sum(dim=-1)
    return sums_BGFD.sum(dim=-2) / counts_BG.clamp(min=1)[..., None], counts_BG


def windows(tokens: int, ratio: int) -> int:
    """Soft tokens of a text: ceil(tokens / ratio)."""
    return -(-tokens // ratio)
