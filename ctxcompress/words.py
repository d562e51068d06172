"""Where a text may be cut: tokens -> units of whole words or characters; kept units -> text again.

Unit borders follow Unicode's default word borders (UAX 29), so combining marks, emoji sequences and
right-to-left words stay whole, and scripts without spaces are cut between characters. White space belongs to
the word after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import regex
import torch
from torch import Tensor

from ctxcompress.types import Span

MAX_UNIT_TOKENS = 16  # a longer "word" (a hash, base64) is cut: keeping or losing it whole helps nobody
_BORDERS = regex.compile(r"\b", flags=regex.WORD | regex.VERSION1)
_HALF_PAIRS = regex.compile("[\ud800-\udfff]")
_CHARACTERS = regex.compile(r"\X")  # as readers see them: a letter with its marks, a whole family emoji


def readable(text: str) -> str:
    """`text` as tokenizers can read it: halves of surrogate pairs, which are no characters, become U+FFFD.

    Texts cut by UTF-16 code units hold them. The length stays, and so do the places of all other characters.
    """
    whole: str = _HALF_PAIRS.sub("\N{REPLACEMENT CHARACTER}", text)
    return whole


def word_units(text: str, spans: Sequence[Span]) -> Tensor:
    """Number of the unit each token belongs to.

    Args:
        text: the source.
        spans: character range of each token, in order, covering the text.

    Returns:
        (T,) int64; starts at 0 and rises by 0 or 1.

    Example:
        >>> word_units("an apple", [(0, 2), (2, 5), (5, 8)]).tolist()  # an| app|le
        [0, 1, 1]
    """
    borders = {border.start() for border in _BORDERS.finditer(text)}
    characters = {character.start() for character in _CHARACTERS.finditer(text)}
    starts: list[bool] = []
    cuttable: list[bool] = []
    end = 0
    for start, stop in spans:
        after_space = start > 0 and text[start - 1].isspace()
        cuttable.append(start >= end and start in characters)
        starts.append(start >= end and start in borders and start in characters and not after_space)
        end = max(end, stop)
    units_T = _numbered(starts)
    crowded_T = torch.bincount(units_T, minlength=1)[units_T] > MAX_UNIT_TOKENS if len(starts) else units_T
    pairs = zip(starts, cuttable, crowded_T.tolist(), strict=True)
    return _numbered([start or (crowded and cut) for start, cut, crowded in pairs])


def character_units(spans: Sequence[Span]) -> Tensor:
    """Number of the unit each token belongs to when units are tokens; tokens of one character stay together.

    Example:
        >>> character_units([(0, 2), (2, 3), (2, 3), (3, 5)]).tolist()
        [0, 1, 1, 2]
    """
    ends = [0, *(stop for _, stop in spans)]
    return _numbered([start >= end for (start, _), end in zip(spans, ends, strict=False)])


def _numbered(starts: Sequence[bool]) -> Tensor:
    if not starts:
        return torch.zeros(0, dtype=torch.int64)
    numbers = torch.tensor(starts, dtype=torch.int64).cumsum(dim=0)
    return numbers - numbers[0]


def tokens_within(spans: Sequence[Span], protected: Iterable[Span]) -> Tensor:
    """Which tokens share a character with a protected range, (T,) bool."""
    length = max((stop for _, stop in spans), default=0)
    borders = torch.zeros(length + 2, dtype=torch.int64)
    for start, stop in protected:
        borders[min(start, length)] += 1
        borders[min(stop, length)] -= 1
    characters_before = torch.nn.functional.pad((borders.cumsum(dim=0) > 0).cumsum(dim=0), (1, 0))
    ranges = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2)
    return characters_before[ranges[:, 1]] > characters_before[ranges[:, 0]]


def joined(text: str, kept: Sequence[Span]) -> tuple[str, tuple[Span, ...]]:
    """Text of the kept character ranges, and those ranges merged; the text is exactly their join.

    Where two words would run together ("state-of" without its hyphen), one separating character that stood
    between them in the source is kept as well.

    Args:
        text: the source.
        kept: character ranges in order of their start.
    """
    merged: list[Span] = []
    for start, stop in kept:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            continue
        if merged:
            merged.extend(_separator(text, merged[-1][1], start))
        merged.append((start, stop))
    spans = _merged_neighbours(merged)
    return "".join(text[start:stop] for start, stop in spans), spans


def _separator(text: str, end: int, start: int) -> list[Span]:
    """The character of the gap that keeps its neighbours apart, if they would run together without it."""
    # A mark says nothing about borders without its letter, so some context comes along.
    before, after = text[max(end - 16, 0) : end], text[start]
    if _parted(before, after):
        return []
    gap = list(_CHARACTERS.finditer(text, end, start))
    spaces = (found.span() for found in gap if found.group().isspace())
    others = (
        found.span() for found in gap if _parted(before, found.group()) and _parted(found.group(), after)
    )
    span = next(spaces, None) or next(others, None)
    return [] if span is None else [span]


def _parted(left: str, right: str) -> bool:
    """Whether a word may end between two strings that stand side by side."""
    return (
        left[-1].isspace()
        or right[0].isspace()
        or any(border.start() == len(left) for border in _BORDERS.finditer(left + right))
    )


def _merged_neighbours(spans: Sequence[Span]) -> tuple[Span, ...]:
    merged: list[Span] = []
    for start, stop in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)
