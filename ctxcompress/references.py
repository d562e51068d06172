"""Names for what is left of documents: strings that travel through other people's code in place of tensors.

A reference is a keyed hash, and the key never leaves this process: nobody can make one up or tell what it
stands for, and the same content always has the same one, so that caches of prompts work. What it names is
held in memory up to a limit; then the references that were used least recently expire.

Where documents are joined to plain text, a placeholder stands for a document: a reference in brackets. Text
that looks like a placeholder but names nothing here stays text.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch

from ctxcompress.errors import InputError
from ctxcompress.types import SoftTokens

Parts = tuple[str | SoftTokens, ...]
"""What is left of a document, in order: texts and soft tokens."""

_PLACEHOLDER = re.compile(r"\[\[ctx:([0-9a-f]{32})\]\]")


class References:
    """Issues references to what is left of documents, and resolves its own; safe to share among threads.

    Args:
        memory_bytes: most bytes of what is named; the least recently used expire beyond.
    """

    def __init__(self, memory_bytes: int = 1 << 28) -> None:
        self._key = secrets.token_bytes(32)
        self._limit = memory_bytes
        self._held: OrderedDict[str, Parts] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def issue(self, parts: Sequence[str | SoftTokens]) -> str:
        """A reference to `parts`: 32 hexadecimal digits, equal for equal parts.

        Raises:
            InputError: the parts alone exceed the memory.
        """
        held = tuple(parts)
        size = _bytes(held)
        if size > self._limit:
            raise InputError(
                f"what a reference names must fit {self._limit:,} bytes, got {size:,}; compress further"
            )
        reference = self._hash(held)
        with self._lock:
            if reference not in self._held:
                self._bytes += size
            self._held[reference] = held
            self._held.move_to_end(reference)
            while self._bytes > self._limit:
                self._bytes -= _bytes(self._held.popitem(last=False)[1])
        return reference

    def resolve(self, reference: str) -> Parts:
        """What `reference` names.

        Raises:
            InputError: it names nothing here; whether it ever did, or does elsewhere, is not told.
        """
        found = self._find(reference)
        if found is None:
            raise InputError(
                "a reference must be one that the same store issued in this process and still holds, got "
                "another; compress the documents again, and give compressor and decoder the same store"
            )
        return found

    def expand(self, text: str) -> list[str | SoftTokens]:
        """`text` with what its placeholders stand for in their places; unknown ones stay text."""
        expanded: list[str | SoftTokens] = []
        end = 0
        for match in _PLACEHOLDER.finditer(text):
            found = self._find(match[1])
            if found is not None:
                expanded += [text[end : match.start()], *found]
                end = match.end()
        return [part for part in (*expanded, text[end:]) if len(part)]

    def clear(self) -> None:
        """Let all references expire."""
        with self._lock:
            self._held.clear()
            self._bytes = 0

    def after_fork(self) -> None:
        """The lock may be held by a thread that this process does not have."""
        self._lock = threading.Lock()
        self._bytes = sum(map(_bytes, self._held.values()))

    def _find(self, reference: str) -> Parts | None:
        with self._lock:
            found = self._held.get(reference) if isinstance(reference, str) else None
            if found is not None:
                self._held.move_to_end(reference)
            return found

    def _hash(self, parts: Parts) -> str:
        digest = hashlib.blake2b(key=self._key, digest_size=16)
        for part in parts:
            # The length first: no two sequences of parts have the same bytes.
            content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else _soft_bytes(part)
            digest.update(f"{type(part).__name__} {len(content)} ".encode() + content)
        return digest.hexdigest()


def placeholder(reference: str) -> str:
    """Text that stands for what `reference` names, for chains that join documents to one string."""
    return f"[[ctx:{reference}]]"


def _bytes(parts: Parts) -> int:
    """About what parts take in memory."""
    return 512 + sum(len(part) * 4 if isinstance(part, str) else part.embeddings_MD.nbytes for part in parts)


def _soft_bytes(soft: SoftTokens) -> bytes:
    values = soft.embeddings_MD.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    meaning = f"{soft.fingerprint} {soft.ratio} {soft.tokens} {soft.embeddings_MD.dtype} {len(soft)} "
    return meaning.encode() + values
