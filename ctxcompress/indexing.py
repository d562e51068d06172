"""Documents -> what queries need of them, made once: the work of index time.

Each document is cut into chunks, each chunk is encoded on its own, and the encoder's states are kept at the
finest ratio with the number of tokens behind each: every coarser ratio, and so every budget, follows from
them without the encoder. A store keeps them between calls and processes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ctxcompress.backbone import Backbone, Encoding
from ctxcompress.chunking import CHUNK_TOKENS, Chunk, chunked
from ctxcompress.errors import ConfigError
from ctxcompress.methods.dac import Progress
from ctxcompress.soft import EncodedText, Features, SoftCompressor
from ctxcompress.store import SoftTokenStore
from ctxcompress.stored import StoredChunk, StoredDocument, store_key

BATCH = 64  # documents encoded between two reports of progress, and written to the store together


class Indexer:
    """Encodes documents that a store does not hold yet.

    Args:
        backbone: the base model, for the NLL of chunks.
        soft: encodes.
        store: keeps what was encoded.
        chunk_tokens: most tokens of a chunk; None takes 64, or the encoder's window if that is less.

    Raises:
        ConfigError: chunks beyond the encoder's window.
    """

    def __init__(
        self,
        backbone: Backbone,
        soft: SoftCompressor,
        store: SoftTokenStore,
        chunk_tokens: int | None = None,
    ) -> None:
        chunk_tokens = min(CHUNK_TOKENS, soft.window) if chunk_tokens is None else chunk_tokens
        if not 1 <= chunk_tokens <= soft.window:
            raise ConfigError(
                f"chunk_tokens must be in [1, {soft.window}], the encoder's window, got {chunk_tokens}"
            )
        self.soft = soft
        self.store = store
        self._backbone = backbone
        self.chunk_tokens = chunk_tokens

    def key(self, text: str) -> str:
        """What the store calls a document: a hash of its text and of everything that made its entry."""
        alignment = self.soft.config.window_alignment
        return store_key(text, self.soft.fingerprint, self.chunk_tokens, alignment)

    def read(
        self,
        texts: Sequence[str],
        encodings: Sequence[Encoding],
        *,
        with_nll: bool = False,
        progress: Progress | None = None,
    ) -> list[StoredDocument]:
        """Every document from the store; what is missing there is encoded first, equal texts once.

        Args:
            texts: the documents.
            encodings: of the texts.
            with_nll: also the NLL of chunks, a forward pass of the whole base over new documents.
            progress: told about encoding: ("encoding", documents done, documents to encode).
        """
        keys = [self.key(text) for text in texts]
        places = {key: place for place, key in enumerate(keys)}
        found = self.store.get(list(places))
        missing = [key for key in places if key not in found]
        for start in range(0, len(missing), BATCH):
            if progress is not None:
                progress("encoding", start, len(missing))
            batch = missing[start : start + BATCH]
            own = [places[key] for key in batch]
            made = self._encoded([texts[place] for place in own], [encodings[place] for place in own])
            found |= self._kept(dict(zip(batch, made, strict=True)))
        if progress is not None and missing:
            progress("encoding", len(missing), len(missing))
        if with_nll:
            unread = [key for key in places if any(math.isnan(chunk.nll) for chunk in found[key].chunks)]
            nll = self._backbone.token_nll([encodings[places[key]].ids for key in unread])
            found |= self._kept(
                {key: _with_nll(found[key], nll_T) for key, nll_T in zip(unread, nll, strict=True)}
            )
        return [found[key] for key in keys]

    def _kept(self, documents: dict[str, StoredDocument]) -> dict[str, StoredDocument]:
        """Documents as the store rounds them, so that first and later calls agree."""
        if self.store.readonly:
            return documents
        self.store.put(documents, fingerprint=self.soft.fingerprint, replace=True)
        return documents | self.store.get(list(documents))

    def _encoded(self, texts: Sequence[str], encodings: Sequence[Encoding]) -> list[StoredDocument]:
        chunks = [
            chunked(text, encoding.ids, encoding.spans, self.chunk_tokens)
            for text, encoding in zip(texts, encodings, strict=True)
        ]
        nothing_MD = torch.zeros(0, self.soft.encoder.config.hidden_size)
        # Features that depend on the ratio are made again for each; the coarsest is only for the ratio head.
        ratio = self.soft.config.ratio_set[0 if self.soft.config.features == "mean_pool" else -1]
        encoded = iter(self.soft.encode([chunk.ids for own in chunks for chunk in own], ratio))
        return [_stored(own, [next(encoded) for _ in own], ratio, nothing_MD) for own in chunks]


def encoded_chunks(document: StoredDocument, soft: SoftCompressor) -> list[EncodedText]:
    """Every chunk of a stored document, as the encoder would return it.

    The residual's input embeddings are looked up again: token ids take a hundredth of their room.
    """
    ids: list[int] = document.ids_T.tolist()
    tokens = [chunk.tokens for chunk in document.chunks]
    counts = [soft.size(count, document.ratio) for count in tokens]
    if not counts:
        return []
    states = document.states_MD.to(soft.device).split(counts)
    behind = document.counts_M.to(soft.device, torch.float32).split(counts)
    starts = [0, *accumulate(tokens)]
    return [
        EncodedText(
            Features(states_MD, soft.embedded(ids[start : start + chunk.tokens], document.ratio), counts_M),
            document.ratio,
            chunk.tokens,
            chunk.log2_ratio,
        )
        for chunk, states_MD, counts_M, start in zip(document.chunks, states, behind, starts, strict=False)
    ]


def _stored(
    chunks: Sequence[Chunk], encoded: Sequence[EncodedText], ratio: int, nothing_MD: Tensor
) -> StoredDocument:
    return StoredDocument(
        chunks=tuple(
            StoredChunk(chunk.span, len(chunk.ids), math.nan, text.log2_ratio)
            for chunk, text in zip(chunks, encoded, strict=True)
        ),
        ids_T=torch.tensor([token for chunk in chunks for token in chunk.ids], dtype=torch.int32),
        states_MD=torch.cat([nothing_MD, *(text.features.states_BMD.float().cpu() for text in encoded)]),
        counts_M=torch.cat(
            [nothing_MD[:, 0].int(), *(text.features.counts_BM.int().cpu() for text in encoded)]
        ),
        ratio=ratio,
    )


def _with_nll(document: StoredDocument, nll_T: Tensor) -> StoredDocument:
    ends = accumulate((chunk.tokens for chunk in document.chunks), initial=0)
    chunks = tuple(
        dataclasses.replace(chunk, nll=float(nll_T[start:stop].mean()))
        for chunk, (start, stop) in zip(document.chunks, pairwise(ends), strict=True)
    )
    return dataclasses.replace(document, chunks=chunks)
