"""Documents -> chunks, the units that get a ratio of their own: token ids and character spans.

A chunk ends at the end of a sentence where one is near, else between words, so that raw text next to soft
tokens reads well and has the tokens it had in the document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ctxcompress.types import Span

CHUNK_TOKENS = 64
"""Most tokens of a chunk: a sentence or two.

A budget then buys the sentences that answer as raw text, where larger chunks would have bought a coarser
copy of everything. Chosen on 60 to 120 questions of Natural Questions (8x) and SQuAD (4x), where 32 and 48
were no clear gain.
"""
BACK = 4  # a boundary is sought in the last quarter of a chunk


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of a document's tokens.

    Attributes:
        ids: token ids.
        span: characters of the document; the spans of all chunks cover it without gaps.
    """

    ids: tuple[int, ...]
    span: Span


def chunked(text: str, ids: Sequence[int], spans: Sequence[Span], size: int = CHUNK_TOKENS) -> list[Chunk]:
    """Cut an encoded document into chunks of at most `size` tokens.

    Args:
        text: the document.
        ids: its token ids.
        spans: characters of each token, without gaps.
        size: most tokens of a chunk, >= 1.

    Returns:
        The chunks in order, none empty; a document without tokens has none.
    """
    chunks: list[Chunk] = []
    start = 0
    while start < len(ids):
        stop = len(ids) if len(ids) - start <= size else _boundary(text, spans, start, start + size)
        first = spans[start][0] if start else 0
        last = spans[stop][0] if stop < len(ids) else len(text)
        chunks.append(Chunk(tuple(ids[start:stop]), (first, last)))
        start = stop
    return chunks


def _boundary(text: str, spans: Sequence[Span], start: int, stop: int) -> int:
    """The last token in reach that begins a sentence, else a word, else the farthest whole character."""
    reach = range(stop, max(stop - (stop - start) // BACK, start), -1)
    word = 0
    for token in reach:
        first = spans[token][0]
        begins_word = text[first].isspace() or text[first - 1].isspace()
        before = text[max(first - 8, 0) : first].rstrip()[-1:] if begins_word else ""
        if before in (".", "!", "?", "\N{IDEOGRAPHIC FULL STOP}") or "\n" in text[first - 1 : first + 1]:
            return token
        word = word or (token if begins_word else 0)
    # Bytes of one character share its span; chunks of a single character's bytes are cut where they are.
    whole = (token for token in range(stop, start, -1) if spans[token - 1][1] <= spans[token][0])
    return word or next(whole, stop)
