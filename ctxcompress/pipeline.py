"""The front door: documents + query -> every document with its budget -> shorter documents -> answer.

A document shrinks to fewer words (text mode, any model) or to soft tokens (a model with an adapter).
"""

from __future__ import annotations

import asyncio
import functools
import math
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ctxcompress import checkpoint
from ctxcompress.allocators import Allocator, make_allocator
from ctxcompress.backbone import Backbone
from ctxcompress.budgets import largest_remainder
from ctxcompress.calibration import Calibration
from ctxcompress.config import AllocatorName, DACConfig, DASTConfig, Mode, check_target, one_of
from ctxcompress.decoder import LocalDecoder, Prompt
from ctxcompress.embedded import EMBEDDED
from ctxcompress.embedder import Embedder
from ctxcompress.errors import ConfigError, InputError
from ctxcompress.foreign import load_adapter, measured, resolve_adapter
from ctxcompress.indexing import Indexer
from ctxcompress.methods.dac import DAC, Progress
from ctxcompress.methods.dast import DAST, Worth
from ctxcompress.prompt import Turn, question_prompt, turns_prompt
from ctxcompress.references import References
from ctxcompress.remote import VLLMDecoder
from ctxcompress.shrink import SoftShrink, ranks, requested, weighed, whole
from ctxcompress.soft import SoftCompressor
from ctxcompress.store import SoftTokenStore
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

# While one thread loads a shared compressor the others wait for it, instead of loading it again.
_SHARING = threading.Lock()
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
        adapter: the model's soft-token adapter, a folder or hub id (OWNER/REPO, with @REVISION or /FOLDER),
            fetched and read when it is first needed; None is text only.
        store: keeps what was encoded for soft mode, so that no document is encoded twice: a `SoftTokenStore`
            or a folder for one; None keeps it in memory.
        chunk_tokens: most tokens of a chunk, the unit that gets a ratio of its own in soft mode; None takes
            64, or the encoder's window if that is less.

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
        store: SoftTokenStore | str | os.PathLike[str] | None = None,
        chunk_tokens: int | None = None,
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
        self._store = store
        self._dac = DAC(backbone, dac)
        self._dast_config = dast
        self._calibration = calibration
        self._chunk_tokens = chunk_tokens
        self._seed = seed
        self._adapter = adapter
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
        store: SoftTokenStore | str | os.PathLike[str] | None = None,
        chunk_tokens: int | None = None,
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
            adapter: the model's soft-token adapter, a folder or hub id; "embedded" is the one that ships with
                the embedded model; None is text only.
            store: keeps what was encoded for soft mode: a `SoftTokenStore` or a folder for one; None keeps it
                in memory.
            chunk_tokens: most tokens of a chunk, the unit that gets a ratio of its own in soft mode; None
                takes 64, or the encoder's window if that is less.

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
            store=store,
            chunk_tokens=chunk_tokens,
        )

    @classmethod
    def shared(
        cls,
        name: str | os.PathLike[str] = EMBEDDED,
        *,
        device: str | torch.device | None = None,
        adapter: str | os.PathLike[str] | None = EMBEDDED,
        store: SoftTokenStore | str | os.PathLike[str] | None = None,
    ) -> ContextCompressor:
        """`from_pretrained`, once per process: the same settings give the same compressor.

        So the node that compresses and the decoder that reads share one model, and one store of references.

        Raises:
            ModelError: the model cannot be loaded.
        """
        with _SHARING:
            return _shared(_hashable(name), device, _hashable(adapter), _hashable(store))

    @property
    def soft(self) -> SoftCompressor:
        """The adapter's encoder, converter and decoder.

        Raises:
            ConfigError: there is no adapter.
            CheckpointError: it cannot be used.
        """
        with self._loading:
            if self._soft is None:
                self._soft = load_adapter(self.backbone, self._folder)
        return self._soft

    @functools.cached_property
    def _folder(self) -> Path:
        """The adapter's folder, fetched from the hub if it is an id.

        Raises:
            ConfigError: there is no adapter.
            CheckpointError: it is neither there nor on the hub.
        """
        if self._adapter is None:
            raise ConfigError(
                f"mode 'soft' needs a soft-token adapter for {self.backbone.name!r}, got none; pass "
                "adapter=FOLDER or a hub id, train one with ctxcompress train, or use mode='text'"
            )
        return resolve_adapter(self._adapter)

    @functools.cached_property
    def store(self) -> SoftTokenStore:
        """Keeps what was encoded; a folder is opened when it is first needed.

        Raises:
            StoreError: the folder cannot be used.
        """
        return self._store if isinstance(self._store, SoftTokenStore) else SoftTokenStore(self._store)

    @functools.cached_property
    def soft_dast(self) -> DAST:
        """DAST's scores read off soft tokens, by the adapter's decoder at the heads its calibration names."""
        calibration = self._calibration or checkpoint.calibration(self._folder) or self.dast.calibration
        return DAST(self.soft.decoder, self._dast_config, calibration, as_asked=True)

    @property
    def indexer(self) -> Indexer:
        """Encodes documents into the store."""
        return Indexer(self.backbone, self.soft, self.store, self._chunk_tokens)

    def index(
        self,
        documents: Iterable[Document | str | Mapping[str, Any]],
        *,
        with_nll: bool = False,
        progress: Progress | None = None,
    ) -> int:
        """Encode documents into the store ahead of all questions.

        Args:
            documents: as for `compress`; those the store holds are not encoded again.
            with_nll: also the NLL of chunks, which DAST's modes "paper" and "scaled" weigh.
            progress: told about encoding.

        Returns:
            Number of documents that were encoded.
        """
        texts = [document.text for document in as_documents(documents)]
        indexer = self.indexer
        missing = self.store.missing(list({indexer.key(text) for text in texts}))
        indexer.read(
            texts, [self.backbone.encode(text) for text in texts], with_nll=with_nll, progress=progress
        )
        return len(missing)

    def compress(
        self,
        documents: Iterable[Document | str | Mapping[str, Any]],
        query: str | None = None,
        *,
        budget: int | None = None,
        compression_ratio: float | None = None,
        ratio_scale: float | None = None,
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
            budget: most tokens of all documents together, > 0. Give this, a ratio or a scale.
            compression_ratio: original tokens / compressed tokens, >= 1; of very short documents a token each
                is left, and a chunk's last, partly filled soft token counts as one.
            ratio_scale: for `semi_dynamic`: what to add to every predicted log2 ratio; +1 asks for twice the
                compression. With a budget the scale is found that just fits.
            mode: "text" prunes words; "soft" makes soft tokens, which needs an adapter; "auto" takes what the
                adapter's card measured as better at the asked ratio, and "text" without an adapter.
            allocator: who decides each document's part: dast, uniform, random, bm25, embedding; in soft mode
                also semi_dynamic and dast+semi_dynamic.
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
        check_target(budget, compression_ratio, ratio_scale)
        read = as_documents(documents)
        protected = protected or {}
        _check_protected(read, protected)
        if ratio_scale is not None and "semi_dynamic" not in allocator:
            raise ConfigError(
                f"ratio_scale turns the dial of semi_dynamic, got allocator {allocator!r}; pass budget or "
                "compression_ratio, or allocator='semi_dynamic'"
            )
        encodings = [self.backbone.encode(document.text) for document in read]
        before = [len(encoding.ids) for encoding in encodings]
        if mode == "auto" and "semi_dynamic" in allocator:
            mode = "soft"
        mode = self._mode("text" if protected and mode == "auto" else mode, budget, compression_ratio, before)
        if protected and mode == "soft":
            raise InputError(
                "protected spans need text mode, soft tokens keep no words apart; use mode='text'"
            )
        weigher = self._allocator(allocator, mode)
        query = _query(query, allocator if read and weigher.needs_query else None)
        if mode == "soft":
            shrink = SoftShrink(
                self.indexer, weigher, budget, compression_ratio, ratio_scale, allow_drop, progress
            )
            return shrink.run(read, encodings, query, allocator)
        budget = _total(budget, compression_ratio, before, allow_drop)
        started = time.perf_counter()
        worth = None
        if sum(before) > budget:
            worth = weighed(weigher, requested(read, encodings, query), progress)
        scored = time.perf_counter()
        pruned = self._pruned(read, before, worth, budget, allow_drop, protected, progress)
        return CompressionResult(
            documents=pruned,
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
        self, result: CompressionResult, *, max_new_tokens: int = 64, order: Order = "score"
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
        parts = result.parts(order)
        decoder = self.decoder(adapted=any(not isinstance(part, str) for own in parts for part in own))
        started = time.perf_counter()
        prompt = question_prompt(self.backbone, query, parts)
        completion = decoder.generate(prompt, max_new_tokens=max_new_tokens)
        seconds = {**result.seconds, "decode": time.perf_counter() - started}
        return Answer(
            completion.text, result, completion.prompt_tokens, completion.completion_tokens, seconds
        )

    @property
    def references(self) -> References:
        """Names for what is left of documents, to be passed on in place of tensors; they are the store's."""
        return self.store.references

    def prompt(self, turns: Sequence[Turn[SoftTokens]]) -> Prompt:
        """A conversation for a decoder, in the model's chat template.

        Args:
            turns: pairs of a role ("system", "user", "assistant") and contents: texts and soft tokens.

        Raises:
            InputError: no turns, another role, or roles in an order the template cannot show.
        """
        return turns_prompt(self.backbone, turns)

    def decoder(self, *, adapted: bool | None = None) -> LocalDecoder:
        """The model that answers.

        Args:
            adapted: under the adapter, which reads soft tokens too, or as it is; None is under the adapter if
                there is one.
        """
        return LocalDecoder(*self._reader(adapted))

    def remote_decoder(
        self,
        base_url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 2,
    ) -> VLLMDecoder:
        """The model that answers, served by vLLM from the folder that `ctxcompress export` wrote.

        Args:
            base_url: of the server, like http://localhost:8000.
            model: its name there; None takes the first one the server lists.
            api_key: the server's.
            timeout: seconds the server may be silent.
            max_retries: further attempts after 429, 5xx or a lost connection.
        """
        base, fingerprint = self._reader(None)
        return VLLMDecoder(
            base,
            base_url,
            fingerprint=fingerprint,
            model=model,
            api_key=api_key,
            timeout=timeout,
            max_retries=max_retries,
        )

    def _reader(self, adapted: bool | None) -> tuple[Backbone, str]:
        """A model, and the fingerprint of the soft tokens it reads."""
        if self._adapter is not None if adapted is None else adapted:
            return self.soft.decoder, self.soft.fingerprint
        return self.backbone, ""

    def _mode(
        self, mode: Mode, budget: int | None, compression_ratio: float | None, before: Sequence[int]
    ) -> Literal["text", "soft"]:
        """What "auto" stands for: the better mode at the measured ratio nearest to the asked one."""
        if mode == "soft":
            return "soft"
        if mode == "text" or self._adapter is None:
            return "text"
        found = measured(self._folder)
        if not found:
            return "text"
        wish = math.log2(max(compression_ratio or sum(before) / (budget or 1), 1.0))
        nearest = min(found, key=lambda ratio: abs(math.log2(float(ratio)) - wish))
        return "soft" if found[nearest]["soft"] > found[nearest]["text"] else "text"

    def _allocator(self, name: AllocatorName, mode: Literal["text", "soft"]) -> Allocator:
        soft = self.soft if mode == "soft" else None
        dast = self.soft_dast if mode == "soft" else self.dast
        return make_allocator(name, dast=dast, embedder=self.embedder, seed=self._seed, soft=soft)

    def _pruned(
        self,
        documents: Sequence[Document],
        before: Sequence[int],
        worth: Worth | None,
        budget: int,
        allow_drop: bool,
        protected: Mapping[str, Sequence[Span]],
        progress: Progress | None,
    ) -> tuple[CompressedDocument, ...]:
        """Text mode: every document with the words its part of the budget can hold."""
        if worth is None:
            return whole(documents, before)
        minimum_N = self._minimum(documents, before, budget, allow_drop, protected)
        counts = largest_remainder(
            worth.shares_N, budget, minimum_N=minimum_N, capacity_N=torch.tensor(before)
        ).tolist()
        pruned = self._dac.prune(
            [document.text for document in documents],
            counts,
            protected=[protected.get(document.id, ()) for document in documents],
            progress=progress,
        )
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
                documents, before, counts, worth.shares_N.tolist(), ranks(worth.shares_N), pruned, strict=True
            )
        )

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


def _hashable(setting: Any) -> Any:
    return os.fspath(setting) if isinstance(setting, os.PathLike) else setting


@functools.cache
def _shared(name: Any, device: Any, adapter: Any, store: Any) -> ContextCompressor:
    return ContextCompressor.from_pretrained(name, device=device, adapter=adapter, store=store)


def _total(
    budget: int | None, compression_ratio: float | None, before: Sequence[int], allow_drop: bool
) -> int:
    """Tokens to stay within in text mode; a ratio leaves at least one for each document that stays."""
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
