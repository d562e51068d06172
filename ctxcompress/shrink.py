"""Documents + what they are worth -> documents with fewer tokens: what both modes share, and soft mode.

Text mode hands its part of the budget to `methods.dac`; soft mode gives every chunk a ratio and pools it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ctxcompress.allocators import Allocator, Request
from ctxcompress.backbone import Encoding
from ctxcompress.budgets import reallocate
from ctxcompress.indexing import Indexer, encoded_chunks
from ctxcompress.methods.dac import Progress
from ctxcompress.methods.dast import Worth
from ctxcompress.selector import fitted_scale, select_ratio
from ctxcompress.soft import SoftCompressor
from ctxcompress.stored import StoredDocument
from ctxcompress.types import CompressedChunk, CompressedDocument, CompressionResult, Document, SoftTokens


class SoftShrink:
    """Soft mode: chunks, their worth, a ratio for each, soft tokens.

    Args:
        indexer: reads documents from its store, and encodes what is not there.
        weigher: says what each chunk is worth, or which ratio it asks for.
        budget: most tokens together; this, `compression_ratio` or `ratio_scale`.
        compression_ratio: original / compressed tokens.
        ratio_scale: dial of the ratios that are asked for.
        allow_drop: let chunks lose all their tokens.
        progress: told about work under way.
    """

    def __init__(
        self,
        indexer: Indexer,
        weigher: Allocator,
        budget: int | None,
        compression_ratio: float | None,
        ratio_scale: float | None,
        allow_drop: bool,
        progress: Progress | None,
    ) -> None:
        self._indexer = indexer
        self._soft = indexer.soft
        self._ratios = (1, *self._soft.config.ratio_set)
        self._space = self._soft.config.ratio_space
        self._weigher = weigher
        self._budget = budget
        self._compression_ratio = compression_ratio
        self._ratio_scale = ratio_scale
        self._allow_drop = allow_drop
        self._progress = progress

    def run(
        self, documents: Sequence[Document], encodings: Sequence[Encoding], query: str, allocator: str
    ) -> CompressionResult:
        """Encode what the store lacks, weigh chunks, choose their ratios, and make soft tokens."""
        started = time.perf_counter()
        before = [len(encoding.ids) for encoding in encodings]
        fits = (self._budget is not None and sum(before) <= self._budget) or self._compression_ratio == 1
        stored = (
            []
            if fits
            else self._indexer.read(
                [document.text for document in documents],
                encodings,
                with_nll=self._weigher.needs_nll,
                progress=self._progress,
            )
        )
        encoded = time.perf_counter()
        request = chunk_request(documents, stored, self._soft, query)
        worth = weighed(self._weigher, request, self._progress) if request.ids else None
        scored = time.perf_counter()
        budget, scale, sizes = self._sizes(worth, list(map(len, request.ids)), sum(before))
        shrunk = self._shrunk(request, sizes)
        made = _chunked(documents, before, stored, worth, shrunk) if worth else whole(documents, before)
        return CompressionResult(
            documents=made,
            query=query,
            mode="soft",
            allocator=allocator,
            budget=budget,
            prior=worth.prior if worth else "none",
            ratio_scale=scale,
            seconds={
                "encode": encoded - started,
                "score": scored - encoded,
                "compress": time.perf_counter() - scored,
            },
        )

    def _sizes(
        self, worth: Worth | None, tokens: Sequence[int], before: int
    ) -> tuple[int, float | None, list[int]]:
        """The budget, the dial if ratios were asked for, and soft tokens of each chunk."""
        if self._ratio_scale is not None:
            wishes = [] if worth is None else _wishes(worth)
            chosen = [
                select_ratio(wish, self._ratios, ratio_scale=self._ratio_scale, space=self._space)
                for wish in wishes
            ]
            sizes = [self._soft.size(n, one.value) for n, one in zip(tokens, chosen, strict=True)]
            return max(sum(sizes), 1), self._ratio_scale, sizes
        budget = self._budget
        if budget is None:
            ratio = self._compression_ratio or 1.0
            budget = sum(math.ceil(count / ratio) for count in tokens) if tokens else max(before, 1)
        if worth is None:
            return budget, None, []
        if worth.log2_ratios_N is not None:
            return budget, *self._fitted(worth, tokens, budget)
        drop = [0] if self._allow_drop else []
        legal = [[*drop, *(self._soft.size(count, ratio) for ratio in self._ratios)] for count in tokens]
        return budget, None, [int(size) for size in reallocate(worth.shares_N, budget, legal)[0]]

    def _fitted(self, worth: Worth, tokens: Sequence[int], budget: int) -> tuple[float, list[int]]:
        """The gentlest dial that fits; if none does, chunks worth least are dropped first where allowed."""
        least = [self._soft.size(count, self._ratios[-1]) for count in tokens]
        by_share = worth.shares_N.sort(stable=True).indices.tolist()
        excess = sum(least) - budget if self._allow_drop else 0
        first = 0
        while excess > 0:
            excess -= least[by_share[first]]
            first += 1
        kept = sorted(by_share[first:])
        wishes = _wishes(worth)
        scale, chosen = fitted_scale(
            [wishes[place] for place in kept],
            [tokens[place] for place in kept],
            self._ratios,
            budget,
            space=self._space,
            size=self._soft.size,
        )
        sizes = [0] * len(tokens)
        for place, one in zip(kept, chosen, strict=True):
            sizes[place] = self._soft.size(tokens[place], one.value)
        return scale, sizes

    def _shrunk(self, request: Request, sizes: Sequence[int]) -> list[tuple[int, SoftTokens | None]]:
        """Size and soft tokens of each chunk; none where all of its tokens stay, or none does."""
        places = [place for place, ids in enumerate(request.ids) if 0 < sizes[place] < len(ids)]
        ratios = [
            next(
                ratio
                for ratio in self._soft.config.ratio_set
                if self._soft.size(len(request.ids[place]), ratio) == sizes[place]
            )
            for place in places
        ]
        made = self._soft.soften(
            [request.ids[place] for place in places], ratios, [request.encoded[place] for place in places]
        )
        soft = dict(zip(places, made, strict=True))
        return [(size, soft.get(place)) for place, size in enumerate(sizes)]


def _wishes(worth: Worth) -> list[float]:
    return [] if worth.log2_ratios_N is None else worth.log2_ratios_N.tolist()


def requested(documents: Sequence[Document], encodings: Sequence[Encoding], query: str) -> Request:
    """What text mode asks an allocator: one unit a document."""
    return Request(
        [document.text for document in documents],
        [encoding.ids for encoding in encodings],
        [document.score for document in documents],
        query,
    )


def chunk_request(
    documents: Sequence[Document],
    stored: Sequence[StoredDocument],
    soft: SoftCompressor,
    query: str,
) -> Request:
    """What soft mode asks an allocator: one unit a chunk, document after document."""
    texts: list[str] = []
    ids: list[tuple[int, ...]] = []
    retrieved: list[float | None] = []
    nll: list[float] = []
    last: list[bool] = []
    # Nothing is stored when everything fits the budget.
    for document, own in zip(documents, stored, strict=False):
        tokens = own.ids_T.tolist()
        ends = accumulate((chunk.tokens for chunk in own.chunks), initial=0)
        ids += [tuple(tokens[start:stop]) for start, stop in pairwise(ends)]
        texts += [document.text[slice(*chunk.span)] for chunk in own.chunks]
        retrieved += [document.score] * len(own.chunks)
        nll += [chunk.nll for chunk in own.chunks]
        last += [chunk is own.chunks[-1] for chunk in own.chunks]
    encoded = [chunk for own in stored for chunk in encoded_chunks(own, soft)]
    nll_N = torch.tensor(nll, dtype=torch.float64)
    return Request(texts, ids, retrieved, query, encoded, nll_N, last)


def weighed(weigher: Allocator, request: Request, progress: Progress | None) -> Worth:
    """Shares of all units; those without tokens take no part and get none."""
    if progress is not None:
        progress("scoring", 0, 1)
    present = [place for place, ids in enumerate(request.ids) if ids]
    asked = request
    if len(present) < len(request.ids):
        asked = Request(
            [request.texts[place] for place in present],
            [request.ids[place] for place in present],
            [request.retrieved[place] for place in present],
            request.query,
        )
    worth = weigher.worth(asked)
    shares_N = torch.zeros(len(request.ids), dtype=torch.float64)
    shares_N[present] = worth.shares_N.double()
    if progress is not None:
        progress("scoring", 1, 1)
    return Worth(shares_N, worth.prior, worth.log2_ratios_N)


def ranks(shares_N: Tensor) -> list[int]:
    """Place of every document by share, 1 = most; equal shares in their order."""
    ranks = [0] * len(shares_N)
    for rank, place in enumerate(shares_N.sort(descending=True, stable=True).indices.tolist(), start=1):
        ranks[place] = rank
    return ranks


def whole(documents: Sequence[Document], before: Sequence[int]) -> tuple[CompressedDocument, ...]:
    """All documents as they are: nothing had to be weighed."""
    return tuple(
        CompressedDocument(
            id=document.id,
            text=document.text,
            original=document.text,
            metadata=document.metadata,
            score=document.score,
            share=None,
            rank=None,
            budget=tokens,
            tokens_before=tokens,
            tokens_after=tokens,
            kept_spans=((0, len(document.text)),) if document.text else (),
        )
        for document, tokens in zip(documents, before, strict=True)
    )


def _chunked(
    documents: Sequence[Document],
    before: Sequence[int],
    stored: Sequence[StoredDocument],
    worth: Worth,
    shrunk: Sequence[tuple[int, SoftTokens | None]],
) -> tuple[CompressedDocument, ...]:
    """Soft mode: documents with their chunks; a document's budget and share are the sums of its chunks'."""
    shares = iter(worth.shares_N.tolist())
    left = iter(shrunk)
    chunks = [
        [
            CompressedChunk(chunk.span, chunk.tokens, size, share, soft)
            for chunk, (size, soft), share in zip(own.chunks, left, shares, strict=False)
        ]
        for own in stored
    ]
    totals = torch.tensor([sum(chunk.share or 0.0 for chunk in own) for own in chunks], dtype=torch.float64)
    made = []
    for document, tokens, own, share, rank in zip(
        documents, before, chunks, totals.tolist(), ranks(totals), strict=True
    ):
        spans = [chunk.span for chunk in own if chunk.tokens_after]
        kept = ((0, len(document.text)),) if document.text and len(spans) == len(own) else tuple(spans)
        after = sum(chunk.tokens_after for chunk in own)
        made.append(
            CompressedDocument(
                id=document.id,
                text="".join(document.text[start:stop] for start, stop in kept),
                original=document.text,
                metadata=document.metadata,
                score=document.score,
                share=share,
                rank=rank,
                budget=after,
                tokens_before=tokens,
                tokens_after=after,
                kept_spans=kept,
                chunks=tuple(own),
            )
        )
    return tuple(made)
