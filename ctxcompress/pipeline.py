"""The front door: documents + query -> every document with its budget -> shorter documents -> answer.

A document shrinks to fewer words (text mode, any model) or to soft tokens (a model with an adapter).
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ctxcompress import checkpoint
from ctxcompress.allocators import Allocator, Request, make_allocator
from ctxcompress.backbone import Backbone, Encoding
from ctxcompress.budgets import largest_remainder, reallocate
from ctxcompress.calibration import Calibration
from ctxcompress.config import AllocatorName, DACConfig, DASTConfig, Mode, check_target, one_of
from ctxcompress.decoder import LocalDecoder
from ctxcompress.embedded import EMBEDDED
from ctxcompress.embedder import Embedder
from ctxcompress.errors import ConfigError, InputError
from ctxcompress.methods.dac import DAC, Progress
from ctxcompress.methods.dast import DAST, Worth
from ctxcompress.pooling import windows
from ctxcompress.prompt import question_prompt
from ctxcompress.soft import SoftCompressor
from ctxcompress.types import (
    Answer,
    CompressedDocument,
    CompressionResult,
    Document,
    Order,
    SoftTokens,
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
        adapter: folder of the model's soft-token adapter, read when it is first needed; None is text only.

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
        adapter: str | os.PathLike[str] | None = None,
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
        self._adapter = None if adapter is None else Path(adapter)
        self._loading = threading.Lock()
        self._soft: SoftCompressor | None = None

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
        adapter: str | os.PathLike[str] | None = EMBEDDED,
    ) -> ContextCompressor:
        """Load a compressor by the name of its model: "embedded", a local folder or a hub id.

        Args:
            name: the model.
            device: None takes CUDA if there is one, else the CPU.
            dtype: None takes bfloat16 where the processor computes in it, else float32.
            dast: settings of the `dast` allocator.
            dac: settings of the pruning.
            calibration: of the model, or the file it is in.
            embedder: for the `embedding` allocator.
            seed: of the `random` allocator.
            adapter: folder of the model's soft-token adapter; "embedded" is the one that ships with the
                embedded model; None is text only.

        Raises:
            ModelError: the model or the calibration cannot be loaded.
        """
        if isinstance(calibration, (str, os.PathLike)):
            calibration = Calibration.load(calibration)
        backbone = Backbone.from_pretrained(name, device=device, dtype=dtype)
        if adapter == EMBEDDED:
            adapter = checkpoint.shipped() if name == EMBEDDED else None
        return cls(
            backbone,
            dast=dast,
            dac=dac,
            calibration=calibration,
            embedder=embedder,
            seed=seed,
            adapter=adapter,
        )

    @property
    def soft(self) -> SoftCompressor:
        """The adapter's encoder, converter and decoder.

        Raises:
            ConfigError: there is no adapter.
            CheckpointError: it cannot be used.
        """
        if self._adapter is None:
            raise ConfigError(
                f"mode 'soft' needs a soft-token adapter for {self.backbone.name!r}, got none; pass "
                "adapter=FOLDER, train one with ctxcompress train, or use mode='text'"
            )
        with self._loading:
            if self._soft is None:
                self._soft = checkpoint.load(self.backbone, self._adapter)
        return self._soft

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
                is left, and a document's last, partly filled soft token counts as one.
            mode: "text" prunes words; "soft" makes soft tokens, which needs an adapter; "auto" takes what the
                adapter's card measured as better at the asked ratio, and "text" without an adapter.
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
        check_target(budget, compression_ratio)
        mode = self._mode("text" if protected and mode == "auto" else mode, budget, compression_ratio, before)
        if protected and mode == "soft":
            raise InputError(
                "protected spans need text mode, soft tokens keep no words apart; use mode='text'"
            )
        budget = _total(budget, compression_ratio, before, allow_drop, mode)
        weigher = self._allocator(allocator)
        query = _query(query, allocator if read and weigher.needs_query else None)
        started = time.perf_counter()
        worth = None if sum(before) <= budget else _weighed(weigher, read, encodings, query, progress)
        scored = time.perf_counter()
        if worth is None:
            counts = before
            short = [_Short.whole(document, tokens) for document, tokens in zip(read, before, strict=True)]
        elif mode == "soft":
            counts = self._soft_counts(worth.shares_N, before, budget, allow_drop)
            short = self._softened(read, encodings, counts, progress)
        else:
            minimum_N = self._minimum(read, before, budget, allow_drop, protected)
            counts = largest_remainder(
                worth.shares_N, budget, minimum_N=minimum_N, capacity_N=torch.tensor(before)
            ).tolist()
            pruned = self._dac.prune(
                [document.text for document in read],
                counts,
                protected=[protected.get(document.id, ()) for document in read],
                progress=progress,
            )
            short = [_Short(each.text, each.tokens, each.spans) for each in pruned]
        return CompressionResult(
            documents=_compressed(read, before, counts, worth, short),
            query=query,
            mode=mode,
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
            order: of the documents in the prompt, see `CompressionResult.parts`.

        Raises:
            InputError: the result has no query, or its documents do not fit the model's window.
        """
        query = _query(result.query, "answer")
        decoder = self.decoder(adapted=any(document.soft is not None for document in result.documents))
        started = time.perf_counter()
        prompt = question_prompt(self.backbone, query, result.parts(order))
        completion = decoder.generate(prompt, max_new_tokens=max_new_tokens)
        seconds = {**result.seconds, "decode": time.perf_counter() - started}
        return Answer(
            completion.text, result, completion.prompt_tokens, completion.completion_tokens, seconds
        )

    def decoder(self, *, adapted: bool) -> LocalDecoder:
        """The model that answers: as it is, or under the adapter, which reads soft tokens too."""
        return (
            LocalDecoder(self.soft.decoder, self.soft.fingerprint) if adapted else LocalDecoder(self.backbone)
        )

    def _mode(
        self, mode: Mode, budget: int | None, compression_ratio: float | None, before: Sequence[int]
    ) -> Literal["text", "soft"]:
        """What "auto" stands for: the better mode at the measured ratio nearest to the asked one."""
        if mode == "soft":
            return "soft"
        if mode == "text" or self._adapter is None:
            return "text"
        measured: dict[str, dict[str, float]] = checkpoint.describe(self._adapter)["measured"]
        if not measured:
            return "text"
        wish = math.log2(max(compression_ratio or sum(before) / (budget or 1), 1.0))
        nearest = min(measured, key=lambda ratio: abs(math.log2(float(ratio)) - wish))
        return "soft" if measured[nearest]["soft"] > measured[nearest]["text"] else "text"

    def _soft_counts(
        self, shares_N: Tensor, before: Sequence[int], budget: int, allow_drop: bool
    ) -> list[int]:
        """Soft tokens of each document: DAST's Algorithm 1 onto the ratio set, with 1 for raw text."""
        ratios = (1, *self.soft.config.ratio_set)
        drop = [0] if allow_drop else []
        sizes = [[*drop, *(windows(tokens, ratio) for ratio in ratios)] for tokens in before]
        return [int(count) for count in reallocate(shares_N, budget, sizes)[0]]

    def _softened(
        self,
        documents: Sequence[Document],
        encodings: Sequence[Encoding],
        counts: Sequence[int],
        progress: Progress | None,
    ) -> list[_Short]:
        """Every document at its number of soft tokens; all of its tokens means raw text."""
        if progress is not None:
            progress("encoding", 0, 1)
        places = [
            place
            for place, (count, encoding) in enumerate(zip(counts, encodings, strict=True))
            if 0 < count < len(encoding.ids)
        ]
        ratios = {
            place: next(
                ratio
                for ratio in self.soft.config.ratio_set
                if windows(len(encodings[place].ids), ratio) == counts[place]
            )
            for place in places
        }
        soft = self.soft.soften(
            [encodings[place].ids for place in places], [ratios[place] for place in places]
        )
        by_place = dict(zip(places, soft, strict=True))
        if progress is not None:
            progress("encoding", 1, 1)
        return [
            _Short.whole(document, count, by_place.get(place))
            for place, (document, count) in enumerate(zip(documents, counts, strict=True))
        ]

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


@dataclass(frozen=True, slots=True)
class _Short:
    """What is left of a document."""

    text: str
    tokens: int
    spans: tuple[Span, ...]
    soft: SoftTokens | None = None

    @classmethod
    def whole(cls, document: Document, tokens: int, soft: SoftTokens | None = None) -> _Short:
        """All of its text, or nothing if no token is left for it."""
        text = document.text if tokens or not document.text.strip() else ""
        return cls(text, tokens, ((0, len(text)),) if text else (), soft)


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
    shortened: Sequence[_Short],
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
            soft=short.soft,
        )
        for document, tokens, count, share, rank, short in zip(
            documents, before, counts, shares, ranks, shortened, strict=True
        )
    )


def _total(
    budget: int | None,
    compression_ratio: float | None,
    before: Sequence[int],
    allow_drop: bool,
    mode: Literal["text", "soft"],
) -> int:
    """Tokens to stay within.

    A ratio never asks for less than a token for each document that must stay, nor for part of a soft token.
    """
    if budget is not None:
        return budget
    ratio = compression_ratio or 1.0
    if mode == "soft":
        return sum(math.ceil(tokens / ratio) for tokens in before)
    present = sum(1 for tokens in before if tokens)
    return max(int(sum(before) / ratio), min(present, 1) if allow_drop else present)


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
