"""Cutting documents: nothing lost, boundaries where a reader would put them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ctxcompress.chunking import chunked


def by_character(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    return [ord(character) for character in text], [(place, place + 1) for place in range(len(text))]


@given(st.text(max_size=200), st.integers(1, 40))
def test_chunks_cover_the_document(text: str, size: int) -> None:
    ids, spans = by_character(text)
    chunks = chunked(text, ids, spans, size)
    assert [token for chunk in chunks for token in chunk.ids] == ids
    assert "".join(text[slice(*chunk.span)] for chunk in chunks) == text
    assert all(1 <= len(chunk.ids) <= size for chunk in chunks)


def test_a_chunk_ends_with_a_sentence_in_reach() -> None:
    text = "One two three four. Five six seven eight nine ten"
    ids, spans = by_character(text)
    # 24 tokens reach into "Five", which begins at 20, in their last quarter.
    assert text[slice(*chunked(text, ids, spans, 24)[0].span)] == "One two three four. "
    # 17 do not reach it; the last word in their last quarter begins at 14.
    assert text[slice(*chunked(text, ids, spans, 17)[0].span)] == "One two three "


def test_a_paragraph_ends_a_chunk_without_a_full_stop() -> None:
    text = "A heading\nand then words that go on"
    ids, spans = by_character(text)
    assert text[slice(*chunked(text, ids, spans, 12)[0].span)] == "A heading\n"


def test_a_character_of_several_tokens_is_not_cut() -> None:
    text = "x" * 6 + "\N{OCTOPUS}" + "y" * 6
    # The octopus takes four tokens, which share its span.
    ids = list(range(16))
    spans = [(n, n + 1) for n in range(6)] + [(6, 7)] * 4 + [(n, n + 1) for n in range(7, 13)]
    chunks = chunked(text, ids, spans, 8)
    assert [text[slice(*chunk.span)] for chunk in chunks] == ["xxxxxx", "\N{OCTOPUS}yyyy", "yy"]


def test_an_endless_word_is_cut_hard() -> None:
    text = "a" * 100
    ids, spans = by_character(text)
    assert [len(chunk.ids) for chunk in chunked(text, ids, spans, 32)] == [32, 32, 32, 4]


def test_an_empty_document_has_no_chunk() -> None:
    assert chunked("", [], []) == []
