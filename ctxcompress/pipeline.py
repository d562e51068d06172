"""The front door: documents + query -> every document with its budget -> shorter documents -> answer."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ctxcompress.allocators import Allocator, Request, make_allocator
from ctxcompress.backbone import Backbone, Encoding
from ctxcompress.budgets import largest_remainder
from ctxcompress.calibration import Calibration
from ctxcompress.config import AllocatorName, DACConfig, DASTConfig, Mode, check_target, one_of
from ctxcompress.decoder import LocalDecoder
from ctxcompress.embedded import EMBEDDED
from ctxcompress.embedder import Embedder
from ctxcompress.errors import ConfigError, InputError
from ctxcompress.methods.dac import DAC, Progress, Pruned
from ctxcompress.methods.dast import DAST, Worth
from ctxcompress.prompt import question_prompt
from ctxcompress.types import (
    Answer,
    CompressedDocument,
    CompressionResult,
    Document,
    Order,
    Span,
    as_documents,
)

LEAST_TOKENS = 4  # what a document keeps at least if the budget allows: enough for a name


class ContextCompressor:
    """Compresses retrieved documents for a query to a token budget, each by what it is worth.

    Args:
        backbone: the language model that scores, prunes and answers.
        dast: settings of the `dast` allocator.
        dac: settings of the pruning; must be able to meet a budget exactly.
        calibration: the model's retrieval heads; None takes the shipped ones or a default.
        embedder: for the `embedding` allocator.
        seed: of the `random` allocator.

    Example:
        >>> compressor = ContextCompressor.from_pretrained("embedded")
        >>> result = compressor.compress(["Rome is in Italy.", "Owls fly."], query="Where is Rome?", budget=7)
        >>> result.tokens_after <= 7
        True
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        dast: DASTConfig | None = None,
        dac: DACConfig | None = None,
        calibration: Calibration | None = None,
        embedder: Embedder | None = None,
        seed: int = 0,
    ) -> None:
        if dac is not None and not (dac.strict and dac.schedule == "anchored"):
            raise ConfigError(
                "a pipeline never exceeds its budget, so dac must have schedule='anchored' and "
                f"strict=True, got schedule={dac.schedule!r}, strict={dac.strict}; use ctxcompress.DAC "
                "itself for other settings"
            )
        self.backbone = backbone
        self.embedder = embedder or Embedder()
        self.dast = DAST(backbone, dast, calibration)
        self._dac = DAC(backbone, dac)
        self._seed = seed

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = EMBEDDED,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        dast: DASTConfig | None = None,
        dac: DACConfig | None = None,
        calibration: Calibration | str | os.PathLike[str] | None = None,
        embedder: Embedder | None = None,
        seed: int = 0,
    ) -> ContextCompressor:
        """Load a compressor by the name of its model: "embedded", a local folder or a hub id.

        Raises:
            ModelError: the model or the calibration cannot be loaded.
        """
        if isinstance(calibration, (str, os.PathLike)):
            calibration = Calibration.load(calibration)
        backbone = Backbone.from_pretrained(name, device=device, dtype=dtype)
        return cls(backbone, dast=dast, dac=dac, calibration=calibration, embedder=embedder, seed=seed)

    def compress(
        self,
        documents: Iterable[Document | str | Mapping[str, Any]],
        query: str | None = None,
        *,
        budget: int | None = None,
        compression_ratio: float | None = None,
        mode: Mode = "auto",
        allocator: AllocatorName = "dast",
        allow_drop: bool = False,
        protected: Mapping[str, Sequence[Span]] | None = None,
        progress: Progress | None = None,
    ) -> CompressionResult:
        """Shorten `documents` so that together they have at most the asked number of tokens.

        Args:
            documents: `Document`s, strings, or mappings with the fields of `Document`; never changed.
            query: the question; the allocators `dast`, `bm25` and `embedding` need one.
            budget: most tokens of all documents together, > 0. Give this or `compression_ratio`.
            compression_ratio: original tokens / compressed tokens, >= 1; of very short documents a token each
                is left.
            mode: "text" prunes words; "auto" is "text" as long as a model has no soft-token adapter.
            allocator: who decides each document's part: dast, uniform, random, bm25, embedding.
            allow_drop: let worthless documents lose all their tokens; otherwise each keeps a few.
            protected: per document id, character ranges that stay.
            progress: told about work under way: (name, done, total).

        Returns:
            One compressed document per document, in the order they came; an empty list gives an empty result.

        Raises:
            InputError: no query where one is needed, duplicate ids, or a budget below the least that works.
            ConfigError: an unknown mode or allocator.
        """
        one_of("mode", mode, Mode)
        one_of("allocator", allocator, AllocatorName)
        read = as_documents(documents)
        protected = protected or {}
        _check_protected(read, protected)
        encodings = [self.backbone.encode(document.text) for document in read]
        before = [len(encoding.ids) for encoding in encodings]
        budget = _total(budget, compression_ratio, before, allow_drop)
        weigher = self._allocator(allocator)
        query = _query(query, allocator if read and weigher.needs_query else None)
        started = time.perf_counter()
        if sum(before) <= budget:
            worth, counts = None, before
        else:
            minimum_N = self._minimum(read, before, budget, allow_drop, protected)
            worth = _weighed(weigher, read, encodings, query, progress)
            counts = largest_remainder(
                worth.shares_N, budget, minimum_N=minimum_N, capacity_N=torch.tensor(before)
            ).tolist()
        scored = time.perf_counter()
        spans = [protected.get(document.id, ()) for document in read]
        pruned = self._dac.prune(
            [document.text for document in read], counts, protected=spans, progress=progress
        )
        return CompressionResult(
            documents=_compressed(read, before, counts, worth, pruned),
            query=query,
            mode="text",
            allocator=allocator,
            budget=budget,
            prior=worth.prior if worth else "none",
            seconds={"score": scored - started, "compress": time.perf_counter() - scored},
        )

    async def acompress(
        self,
        documents: Iterable[Document | str | Mapping[str, Any]],
        query: str | None = None,
        **settings: Any,
    ) -> CompressionResult:
        """`compress` in a worker thread, so that an event loop goes on; same arguments."""
        return await asyncio.to_thread(self.compress, documents, query, **settings)

    def answer(
        self, result: CompressionResult, *, max_new_tokens: int = 64, order: Order = "share"
    ) -> Answer:
        """Answer the result's query from its compressed documents with the compressor's own model.

        Args:
            result: of `compress`, with a query.
            max_new_tokens: longest answer.
            order: of the documents in the prompt, see `CompressionResult.texts`.

        Raises:
            InputError: the result has no query, or its documents do not fit the model's window.
        """
        query = _query(result.query, "answer")
        started = time.perf_counter()
        prompt = question_prompt(self.backbone, query, result.texts(order))
        completion = LocalDecoder(self.backbone).generate(prompt, max_new_tokens=max_new_tokens)
        seconds = {**result.seconds, "decode": time.perf_counter() - started}
        return Answer(
            completion.text, result, completion.prompt_tokens, completion.completion_tokens, seconds
        )

    def _allocator(self, name: AllocatorName) -> Allocator:
        return make_allocator(name, dast=self.dast, embedder=self.embedder, seed=self._seed)

    def _minimum(
        self,
        documents: Sequence[Document],
        before: Sequence[int],
        budget: int,
        allow_drop: bool,
        protected: Mapping[str, Sequence[Span]],
    ) -> Tensor:
        """Fewest tokens of each document: what is protected, and a few words unless it may be dropped."""
        present = sum(1 for tokens in before if tokens)
        if not allow_drop and budget < present:
            raise InputError(
                f"budget must be >= {present} tokens, one for each of {present} documents, got {budget}; "
                "raise it, pass fewer documents, or allow dropping some (allow_drop=True)"
            )
        least = 0 if allow_drop else min(LEAST_TOKENS, budget // present)
        kept = [
            self._dac.protected_tokens(document.text, protected.get(document.id, ()))
            for document in documents
        ]
        minimum_N = torch.tensor([max(min(least, b), min(k, b)) for b, k in zip(before, kept, strict=True)])
        if minimum_N.sum() > budget:
            raise InputError(
                f"budget must be >= {int(minimum_N.sum())} tokens for what is protected in {present} "
                f"documents, got {budget}; raise it or protect less"
            )
        return minimum_N


def _weighed(
    weigher: Allocator,
    documents: Sequence[Document],
    encodings: Sequence[Encoding],
    query: str,
    progress: Progress | None,
) -> Worth:
    """Shares of all documents; those without tokens take no part and get none."""
    if progress is not None:
        progress("scoring", 0, 1)
    present = [place for place, encoding in enumerate(encodings) if encoding.ids]
    request = Request(
        [documents[place] for place in present], [encodings[place].ids for place in present], query
    )
    worth = weigher.worth(request)
    shares_N = torch.zeros(len(documents), dtype=torch.float64)
    shares_N[present] = worth.shares_N.double()
    if progress is not None:
        progress("scoring", 1, 1)
    return Worth(shares_N, worth.prior)


def _compressed(
    documents: Sequence[Document],
    before: Sequence[int],
    counts: Sequence[int],
    worth: Worth | None,
    pruned: Sequence[Pruned],
) -> tuple[CompressedDocument, ...]:
    shares = worth.shares_N.tolist() if worth else [None] * len(documents)
    ranks: list[int | None] = [None] * len(documents)
    if worth:
        for rank, place in enumerate(
            worth.shares_N.sort(descending=True, stable=True).indices.tolist(), start=1
        ):
            ranks[place] = rank
    return tuple(
        CompressedDocument(
            id=document.id,
            text=short.text,
            original=document.text,
            metadata=document.metadata,
            score=document.score,
            share=share,
            rank=rank,
            budget=count,
            tokens_before=tokens,
            tokens_after=short.tokens,
            kept_spans=short.spans,
        )
        for document, tokens, count, share, rank, short in zip(
            documents, before, counts, shares, ranks, pruned, strict=True
        )
    )


def _total(
    budget: int | None, compression_ratio: float | None, before: Sequence[int], allow_drop: bool
) -> int:
    """Tokens to stay within; a ratio never asks for less than a token for each document that must stay."""
    check_target(budget, compression_ratio)
    if budget is not None:
        return budget
    present = sum(1 for tokens in before if tokens)
    return max(int(sum(before) / (compression_ratio or 1.0)), min(present, 1) if allow_drop else present)


def _query(query: str | None, needed_by: str | None) -> str:
    if query is not None and not isinstance(query, str):
        raise InputError(f"query must be a string, got {type(query).__name__}")
    query = query or ""
    if needed_by is not None and not query.strip():
        raise InputError(
            f"{needed_by} needs a query, got an empty one; pass the question, or use allocator='uniform' to "
            "compress without"
        )
    return query


def _check_protected(documents: Sequence[Document], protected: Mapping[str, Sequence[Span]]) -> None:
    lengths = {document.id: len(document.text) for document in documents}
    for name, spans in protected.items():
        if name not in lengths:
            raise InputError(
                f"protected names the document {name!r}, which is not among {sorted(lengths)[:10]}"
            )
        for start, stop in spans:
            if not 0 <= start < stop <= lengths[name]:
                raise InputError(
                    f"protected spans of {name!r} must lie within its {lengths[name]} characters, got "
                    f"({start}, {stop})"
                )
