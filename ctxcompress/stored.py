"""Encoded documents as values: as the encoder left them, and packed as a store keeps them.

Shapes: T tokens, M windows, D hidden.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ctxcompress.errors import InputError
from ctxcompress.types import Span

StoreDtype = Literal["float32", "bfloat16", "float16", "int8"]
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """Unit of allocation.

    Attributes:
        span: half-open range of characters in the document's text.
        tokens: of the chunk; the chunks' tokens sum to the document's.
        nll: mean NLL of its tokens, nats; NaN when it was not computed.
        log2_ratio: what the ratio head predicts.
    """

    span: Span
    tokens: int
    nll: float
    log2_ratio: float


@dataclass(frozen=True, slots=True, eq=False)
class StoredDocument:
    """One document as the encoder left it: all that queries need, whatever their budget.

    Attributes:
        chunks: in order.
        ids_T: int32 token ids.
        states_MD: float32 encoder states, means over windows of the finest ratio, chunk after chunk;
            M may be 0.
        counts_M: int32 tokens behind each mean.
        ratio: the finest ratio.
    """

    chunks: tuple[StoredChunk, ...]
    ids_T: Tensor
    states_MD: Tensor
    counts_M: Tensor
    ratio: int


@dataclass(frozen=True, slots=True)
class StoreEntry:
    """What a store knows of a document without loading it.

    Attributes:
        key: see `store_key`.
        fingerprint: of the compressor that encoded it.
        tokens: of the document.
        bytes: its tensors take.
        created: when it was put, UTC, ISO 8601.
    """

    key: str
    fingerprint: str
    tokens: int
    bytes: int
    created: str


def store_key(text: str, fingerprint: str, chunk_tokens: int, alignment: str) -> str:
    """Key of a document: the hash of all that its encoding depends on.

    Args:
        text: of the document.
        fingerprint: of the compressor.
        chunk_tokens: how the text was cut.
        alignment: of windows within chunks.

    Returns:
        SHA-256, 64 hexadecimal digits.
    """
    return hashlib.sha256(json.dumps([text, fingerprint, chunk_tokens, alignment]).encode()).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class PackedDocument:
    """A document as it lies on the disk: states rounded, chunks as JSON."""

    entry: StoreEntry
    dtype: str
    ratio: int
    chunks: str
    tensors: Mapping[str, Tensor]

    @property
    def width(self) -> int:
        """Size of a state, D."""
        return self.tensors["states"].shape[1]

    @property
    def windows(self) -> int:
        """Number of states, M."""
        return len(self.tensors["states"])

    @property
    def memory(self) -> int:
        """Bytes it takes in memory; the constant is about what its Python objects need."""
        return self.entry.bytes + len(self.chunks) + 1024

    def checksum(self) -> str:
        """Hash of the tensors, and of all of the row that gives them a meaning."""
        meaning = [self.entry.key, self.dtype, self.ratio, self.chunks]
        digest = hashlib.blake2b(json.dumps(meaning).encode(), digest_size=16)
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.view(torch.uint8).flatten().numpy().data)
        return digest.hexdigest()

    def unpacked(self) -> StoredDocument:
        """The document, in tensors of its own."""
        states_MD = self.tensors["states"].to(torch.float32, copy=True)
        if "scales" in self.tensors:
            states_MD.mul_(self.tensors["scales"][:, None])
        chunks = tuple(
            StoredChunk((start, stop), tokens, nll, log2_ratio)
            for start, stop, tokens, nll, log2_ratio in json.loads(self.chunks)
        )
        ids_T, counts_M = self.tensors["ids"].clone(), self.tensors["counts"].clone()
        return StoredDocument(chunks, ids_T, states_MD, counts_M, self.ratio)


class Row(NamedTuple):
    """One line of the index; the fields are the table's columns."""

    key: str
    fingerprint: str
    created: str
    bytes: int
    shard: str
    dtype: str
    ratio: int
    width: int
    first_window: int
    windows: int
    first_token: int
    tokens: int
    chunks: str
    checksum: str

    @property
    def entry(self) -> StoreEntry:
        """What is told about the document."""
        return StoreEntry(self.key, self.fingerprint, self.tokens, self.bytes, self.created)


def pack(
    key: str, document: StoredDocument, dtype: StoreDtype, fingerprint: str, created: str
) -> PackedDocument:
    """A document as it is kept.

    Args:
        key: see `store_key`.
        document: as the encoder left it.
        dtype: of the states; "int8" scales each vector by its largest value.
        fingerprint: of the compressor.
        created: when, UTC, ISO 8601.

    Raises:
        InputError: shapes that contradict each other, or states that are not finite in `dtype`.
    """
    states_MD = document.states_MD.detach().to("cpu", torch.float32)
    tokens = sum(chunk.tokens for chunk in document.chunks)
    shapes = (states_MD.shape[:1], document.counts_M.shape, document.ids_T.shape)
    windows = torch.Size([len(states_MD)])
    if states_MD.ndim != 2 or not states_MD.shape[1] or shapes != (windows, windows, torch.Size([tokens])):
        raise InputError(
            f"document {key} must have states (M, D), counts (M,) and as many ids as its chunks have tokens "
            f"({tokens}), got shapes {tuple(states_MD.shape)}, {tuple(document.counts_M.shape)} and "
            f"{tuple(document.ids_T.shape)}; put it as the encoder made it"
        )
    tensors = {
        "counts": document.counts_M.detach().to("cpu", torch.int32, copy=True),
        "ids": document.ids_T.detach().to("cpu", torch.int32, copy=True),
    }
    if dtype == "int8":
        scales_M = states_MD.abs().amax(dim=1) / 127
        steps_M = torch.where(scales_M > 0, scales_M, 1.0)
        tensors["scales"] = scales_M
        tensors["states"] = (states_MD / steps_M[:, None]).round().clamp(-127, 127).to(torch.int8)
    else:
        tensors["states"] = states_MD.to(_DTYPES[dtype], memory_format=torch.contiguous_format, copy=True)
    if not torch.isfinite(tensors["scales" if dtype == "int8" else "states"]).all():
        raise InputError(
            f"states of document {key} must be finite in {dtype}, got NaN, infinity or values beyond its "
            "range; use bfloat16, or look for what made them"
        )
    chunks = [[*chunk.span, chunk.tokens, chunk.nll, chunk.log2_ratio] for chunk in document.chunks]
    size = sum(tensor.nbytes for tensor in tensors.values())
    entry = StoreEntry(key, fingerprint, tokens, size, created)
    return PackedDocument(entry, dtype, document.ratio, json.dumps(chunks), tensors)


def row_of(packed: PackedDocument, shard: str, first_window: int, first_token: int) -> Row:
    """The line of the index for a document in `shard`, whose states and ids begin at these places."""
    entry = packed.entry
    return Row(
        key=entry.key,
        fingerprint=entry.fingerprint,
        created=entry.created,
        bytes=entry.bytes,
        shard=shard,
        dtype=packed.dtype,
        ratio=packed.ratio,
        width=packed.width,
        first_window=first_window,
        windows=packed.windows,
        first_token=first_token,
        tokens=entry.tokens,
        chunks=packed.chunks,
        checksum=packed.checksum(),
    )
