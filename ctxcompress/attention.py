"""Attention that is read while it is computed, never kept: O(tokens) extra memory instead of tokens x tokens.

`ATTENTION` is registered with transformers as an attention implementation. Without a recorder it is plain
SDPA. With one (a keyword of the model's forward that transformers hands down to every layer) the recorder
computes the same output block by block and keeps only sums:

- `ColumnSums`: attention each token receives from all queries, mean over layers and heads [DAC, s_t].
- `SegmentMass`: attention that questions, none of which sees another, pay to each document, per layer and
  head [DAST, eq. 4].
- `TrainedMass`: the same for a few heads in the middle of a padded batch, with gradients.

Shapes: B batch, H heads, Q queries, T keys, D head size, N documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ctxcompress.types import Span

ATTENTION = "ctxcompress"
QUERY_BLOCK = 32  # queries whose weights exist at the same time: 32 x 2,000 keys x 9 heads x 4 bytes = 2.3 MB
# Keys of a block are rounded up to this: oneDNN keeps a compiled kernel for every shape it meets.
KEY_STEP = 512


class Recorder(Protocol):
    """Computes one layer's attention output (B, H, Q, D) and keeps what it needs of the weights."""

    def attend(self, query_BHQD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, scaling: float) -> Tensor:
        """Causal attention whose last query sees the last key."""
        ...


class ColumnSums:
    """Sum of softmax(QK^T) over queries, per key; mean over layers and heads; exact, in blocks of queries.

    Args:
        query_spans: per row of the batch, the half-open range of positions whose attention counts. Padding
            and context that was counted in an earlier window stay outside it.
    """

    def __init__(self, query_spans: Sequence[Span]) -> None:
        self._query_spans = query_spans
        self._total_BT: Tensor | None = None
        self._buffers: _Buffers | None = None
        self._layers_heads = 0

    @property
    def mean_BT(self) -> Tensor:
        """(B, T) float32: accumulated attention of every key position."""
        if self._total_BT is None:
            raise RuntimeError("no layer has been recorded: the model did not call the registered attention")
        return self._total_BT / self._layers_heads

    def attend(self, query_BHQD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, scaling: float) -> Tensor:
        """See `Recorder`; queries and keys cover the same positions."""
        batch, heads, length, _ = query_BHQD.shape
        if self._total_BT is None:
            self._total_BT = torch.zeros(batch, length, dtype=torch.float32, device=query_BHQD.device)
        positions = torch.arange(length, device=query_BHQD.device)
        counted_BQ = torch.stack(
            [(positions >= start) & (positions < stop) for start, stop in self._query_spans]
        )
        output_BHQD = torch.empty_like(query_BHQD)
        if self._buffers is None:
            self._buffers = _Buffers(query_BHQD, batch * heads * min(QUERY_BLOCK, length) * length)
        for start in range(0, length, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, length)
            seen = min(-(-stop // KEY_STEP) * KEY_STEP, length)
            weights_BHQT, native_BHQT = self._buffers.causal_weights(
                query_BHQD[:, :, start:stop], key_BHTD[:, :, :seen], start, scaling
            )
            output_BHQD[:, :, start:stop] = native_BHQT @ value_BHTD[:, :, :seen]
            counted_B11Q = counted_BQ[:, None, None, start:stop].float()
            self._total_BT[:, :seen] += (counted_B11Q @ weights_BHQT).sum(dim=(1, 2))
        self._layers_heads += heads
        return output_BHQD


class SegmentMass:
    """Attention that questions after some documents pay to each of them, per layer and head.

    The questions stand one after another at the end of one sequence, and each sees the documents and itself:
    a single pass reads them all.

    Args:
        segments: half-open ranges of key positions, one per document, before the questions.
        questions: tokens of each question.
    """

    def __init__(self, segments: Sequence[Span], questions: Sequence[int]) -> None:
        self._starts, self._ends = torch.tensor(segments).T
        self._questions = list(questions)
        self._layers: list[Tensor] = []
        self._hidden_QT: Tensor | None = None

    @property
    def masses(self) -> list[Tensor]:
        """(layers, heads, queries, segments) float32 of each question.

        Rows sum to at most 1, the rest went elsewhere.
        """
        return list(torch.stack(self._layers).split(self._questions, dim=2))

    def attend(self, query_BHQD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, scaling: float) -> Tensor:
        """See `Recorder`; one row. Keys without queries come first: they were computed in an earlier pass."""
        asked, total = sum(self._questions), key_BHTD.shape[2]
        shared, known = total - asked, total - query_BHQD.shape[2]
        read_BHQD, asking_BHQD = query_BHQD.split([shared - known, asked], dim=2)
        # Queries in front, whose output is dropped, let the kernel be causal without a mask of Q x T.
        read_BHQD = torch.nn.functional.scaled_dot_product_attention(
            torch.nn.functional.pad(read_BHQD, (0, 0, known, 0)),
            key_BHTD[:, :, :shared],
            value_BHTD[:, :, :shared],
            is_causal=True,
            scale=scaling,
        )[:, :, known:]
        scores_BHQT = (asking_BHQD @ key_BHTD.transpose(-1, -2)).float().mul_(scaling)
        weights_BHQT = scores_BHQT.masked_fill_(self._hidden(scores_BHQT), -torch.inf).softmax(dim=-1)
        running_HQT = torch.nn.functional.pad(weights_BHQT[0].cumsum(dim=-1), (1, 0))
        self._layers.append((running_HQT[..., self._ends] - running_HQT[..., self._starts]).clamp_(min=0))
        return torch.cat([read_BHQD, weights_BHQT.to(value_BHTD.dtype) @ value_BHTD], dim=2)

    def _hidden(self, scores_BHQT: Tensor) -> Tensor:
        """(Q, T) bool, True for keys that a query must not see: other questions, and what follows it."""
        if self._hidden_QT is None:
            queries, keys = scores_BHQT.shape[-2:]
            hidden_QT = torch.zeros(queries, keys, dtype=torch.bool)
            hidden_QT[:, keys - queries :] = True
            stops = list(accumulate(self._questions, initial=0))
            for own in map(slice, stops, stops[1:]):
                own_keys = slice(keys - queries + own.start, keys - queries + own.stop)
                hidden_QT[own, own_keys].triu_(1)
            self._hidden_QT = hidden_QT.to(scores_BHQT.device)
        return self._hidden_QT


class TrainedMass:
    """Attention that chosen heads pay from question tokens to documents, mean over heads and tokens.

    Args:
        heads: (layer, head) pairs.
        readings: per row of the batch, the ranges of its documents and the range of its question, which comes
            after them.
    """

    def __init__(
        self, heads: Sequence[tuple[int, int]], readings: Sequence[tuple[Sequence[Span], Span]]
    ) -> None:
        self._heads = heads
        questions = [torch.arange(*question) for _, question in readings]
        # Padding asks from before the first token, which sees nothing.
        self._asking_BQ = torch.nn.utils.rnn.pad_sequence(questions, batch_first=True, padding_value=-1)
        self._ranges_BN2 = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(documents).reshape(-1, 2) for documents, _ in readings], batch_first=True
        )
        self._layer = 0
        self._masses: list[Tensor] = []

    @property
    def mass_BN(self) -> Tensor:
        """(B, N) float32; 0 where a row has fewer documents."""
        return torch.cat(self._masses, dim=1).mean(dim=1)

    def attend(self, query_BHQD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, scaling: float) -> Tensor:
        """See `Recorder`; queries and keys cover the same positions."""
        heads = [head for layer, head in self._heads if layer == self._layer]
        self._layer += 1
        if heads:
            self._masses.append(self._read(query_BHQD[:, heads], key_BHTD[:, heads], scaling))
        return torch.nn.functional.scaled_dot_product_attention(
            query_BHQD, key_BHTD, value_BHTD, is_causal=True, scale=scaling
        )

    def _read(self, query_BHTD: Tensor, key_BHTD: Tensor, scaling: float) -> Tensor:
        """(B, H, N) mass of some heads of one layer."""
        device = query_BHTD.device
        self._asking_BQ, self._ranges_BN2 = self._asking_BQ.to(device), self._ranges_BN2.to(device)
        asks_B1Q1 = (self._asking_BQ >= 0)[:, None, :, None]
        places_B1QD = self._asking_BQ.clamp(min=0)[:, None, :, None].expand(
            -1, query_BHTD.shape[1], -1, query_BHTD.shape[-1]
        )
        scores_BHQT = (query_BHTD.gather(2, places_B1QD) @ key_BHTD.transpose(-1, -2)).float() * scaling
        places_T = torch.arange(key_BHTD.shape[2], device=device)
        future_B1QT = places_T > self._asking_BQ.clamp(min=0)[:, None, :, None]
        weights_BHQT = scores_BHQT.masked_fill(future_B1QT, -torch.inf).softmax(dim=-1) * asks_B1Q1
        mean_BHT = weights_BHQT.sum(dim=2) / asks_B1Q1.sum(dim=2)
        starts_B1N, stops_B1N = self._ranges_BN2[:, None].unbind(dim=-1)
        within_B1NT = (places_T >= starts_B1N[..., None]) & (places_T < stops_B1N[..., None])
        # Not a product of matrices: autocast would make that bfloat16.
        return (mean_BHT[:, :, None] * within_B1NT).sum(dim=-1)


class _Buffers:
    """Memory of one block of weights, used for all blocks and layers.

    Megabytes allocated anew for every block would leave holes in the heap.
    """

    def __init__(self, like: Tensor, elements: int) -> None:
        self._native = like.new_empty(elements)
        self._exact = torch.empty(elements, dtype=torch.float32, device=like.device)

    def causal_weights(
        self, query_BHQD: Tensor, key_BHTD: Tensor, first: int, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """softmax(QK^T * scaling), where query q sees the first `first` + q + 1 keys, until the next call.

        In float32 and in the model's own dtype.
        """
        size = (*query_BHQD.shape[:-1], key_BHTD.shape[-2])
        native_BHQT, weights_BHQT = (
            buffer[: math.prod(size)].view(size) for buffer in (self._native, self._exact)
        )
        torch.matmul(query_BHQD, key_BHTD.transpose(-1, -2), out=native_BHQT)
        _hide_future(weights_BHQT.copy_(native_BHQT).mul_(scaling), first)
        weights_BHQT.sub_(weights_BHQT.amax(dim=-1, keepdim=True)).exp_()
        weights_BHQT.div_(weights_BHQT.sum(dim=-1, keepdim=True))
        return weights_BHQT, native_BHQT.copy_(weights_BHQT)


def _hide_future(scores_BHQT: Tensor, first: int) -> Tensor:
    """Set scores of keys after their query to -inf, in place; `first` is the position of the first query."""
    queries, keys = scores_BHQT.shape[-2:]
    future = torch.ones(queries, keys - first, dtype=torch.bool, device=scores_BHQT.device).triu_(1)
    scores_BHQT[..., first:].masked_fill_(future, -torch.inf)
    return scores_BHQT


def _attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    recorder: Recorder | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if recorder is None:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return recorder.attend(query, key, value, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
