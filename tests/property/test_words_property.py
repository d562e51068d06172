"""What holds for texts in every script: cuts fall between characters, kept text points into its source."""

from __future__ import annotations

import itertools
import os
import random

import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxcompress import Backbone
from ctxcompress.types import Span
from ctxcompress.words import MAX_UNIT_TOKENS, character_units, joined, tokens_within, word_units

examples = settings(max_examples=int(os.environ.get("CTXCOMPRESS_MAX_EXAMPLES", "60")), deadline=None)

FRAGMENTS = [
    *["the", "Quick", "don't", "3.14", "1,000", "state-of-the-art", "naïve", "e\u0301te\u0301", "ﬁ", "ß"],
    *["光合作用", "把光能", "。", "「日本語」", "カタカナ", "한국어", "\u1112\u1161\u11ab"],
    *[
        "👨\u200d👩\u200d👧",
        "👍🏽",
        "🇫🇷",
        "🇩🇪🇮🇹",
        "1\ufe0f\u20e3",
        "❤\ufe0f\u200d🔥",
        "🏳\ufe0f\u200d🌈",
        "😀",
    ],
    *["בְּרֵאשִׁית", "בָּרָא", "אֱלֹהִים", "السَّلامُ", "عَلَيْكُم", "\u200fאב\u200e", "٣٤"],
    *["ภาษาไทย", "हिन्दी", "क्षत्रिय", "தமிழ்", "ខ្មែរ"],
    *["def f(x):\n\treturn x['a_b']", "x+=1;", "https://a.b/c?d=e#f", "<|end|>", "\\n", "`", "$$"],
    *[
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u3000",
        "\u2028",
        "-",
        "—",
        ", ",
        ".",
        "...",
        "\x00",
        "\ufeff",
    ],
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=20).map("".join),
    st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=20).map("".join),
    st.text(max_size=40),
)
SHUFFLES = st.randoms(use_true_random=False)


def some(spans: tuple[Span, ...], units: list[int], shuffle: random.Random) -> list[Span]:
    """Spans of the tokens of a random part of the units."""
    part = shuffle.choice([0.1, 0.5, 0.9])
    kept = {unit for unit in set(units) if shuffle.random() < part}
    return [span for span, unit in zip(spans, units, strict=True) if unit in kept]


def characters(spans: list[Span]) -> set[int]:
    return {place for start, stop in spans for place in range(start, stop)}


def broken_characters(text: str, kept: set[int]) -> list[str]:
    """Grapheme clusters (UAX 29) that are kept in part."""
    clusters = list(regex.finditer(r"\X", text))
    parts = [sum(place in kept for place in range(*cluster.span())) for cluster in clusters]
    return [
        ascii(cluster.group())
        for cluster, part in zip(clusters, parts, strict=True)
        if part not in {0, len(cluster.group())}
    ]


@examples
@given(TEXTS)
def test_unit_numbers_rise_by_one_and_no_character_is_in_two_units(backbone: Backbone, text: str) -> None:
    spans = backbone.encode(text).spans
    for units_T in (word_units(text, spans), character_units(spans)):
        assert units_T.dtype == torch.int64
        assert len(units_T) == len(spans)
        assert units_T[:1].tolist() in ([], [0])
        assert set(units_T.diff().tolist()) <= {0, 1}
        of_character: dict[int, int] = {}
        for (start, stop), unit in zip(spans, units_T.tolist(), strict=True):
            for place in range(start, stop):
                assert of_character.setdefault(place, unit) == unit
        assert len(of_character) == len(text)


@examples
@given(TEXTS)
def test_word_units_are_unions_of_character_units_of_limited_size(backbone: Backbone, text: str) -> None:
    spans = backbone.encode(text).spans
    words, tokens = word_units(text, spans).tolist(), character_units(spans).tolist()
    assert len(set(zip(words, tokens, strict=True))) == len(set(tokens))
    for word in set(words):
        if words.count(word) > MAX_UNIT_TOKENS:
            # Only what is one character for its reader may be larger.
            of_word = [span for span, unit in zip(spans, words, strict=True) if unit == word]
            assert len(regex.findall(r"\X", text[of_word[0][0] : of_word[-1][1]])) == 1


@examples
@given(TEXTS, SHUFFLES, st.booleans())
def test_joined_text_is_the_join_of_its_spans(
    backbone: Backbone, text: str, shuffle: random.Random, by_word: bool
) -> None:
    spans = backbone.encode(text).spans
    units_T = word_units(text, spans) if by_word else character_units(spans)
    kept = some(spans, units_T.tolist(), shuffle)
    result, ranges = joined(text, kept)
    assert result == "".join(text[start:stop] for start, stop in ranges)
    edges = [edge for span in ranges for edge in span]
    assert edges == sorted(set(edges))  # in order, none empty, none touching the next
    assert all(0 <= start < stop <= len(text) for start, stop in ranges)
    added = characters(list(ranges)) - characters(kept)
    assert characters(kept) <= characters(list(ranges))
    # What is added stands between two kept ranges.
    assert all(min(characters(kept)) < place < max(characters(kept)) for place in added)
    result.encode()


@examples
@given(TEXTS, SHUFFLES)
def test_what_readers_see_as_one_character_is_never_broken(
    backbone: Backbone, text: str, shuffle: random.Random
) -> None:
    spans = backbone.encode(text).spans
    kept = characters(list(joined(text, some(spans, word_units(text, spans).tolist(), shuffle))[1]))
    assert not broken_characters(text, kept)


@pytest.mark.parametrize(
    "text",
    [
        # 25 bytes, more tokens than a unit may have
        pytest.param("a👨\u200d👩\u200d👧\u200d👦b", id="family"),
        pytest.param("a🇫🇷b", id="flag"),
        pytest.param("x\r\n-y", id="line end"),
        pytest.param("1\ufe0f\u20e3-2\ufe0f\u20e3", id="keycaps"),
        # 24 bytes a word, marks inside
        pytest.param("अनुच्छेद-निर्देश", id="hindi"),
        pytest.param("e\u0301" * 12 + " בְּרֵאשִׁית", id="marks"),
    ],
)
def test_ugly_characters_survive_every_pair_of_units(backbone: Backbone, text: str) -> None:
    spans = backbone.encode(text).spans
    units = word_units(text, spans).tolist()
    for first, second in itertools.combinations_with_replacement(sorted(set(units)), 2):
        kept = [span for span, unit in zip(spans, units, strict=True) if unit in {first, second}]
        assert not broken_characters(text, characters(list(joined(text, kept)[1])))


WORDS = st.text("abcdefxyz", min_size=1, max_size=8)
MARKED_WORDS = st.sampled_from(["e\u0301", "cafe\u0301", "नदी", "עַ", "ga\u0300"])
GAPS = st.sampled_from([" ", "-", ", ", "\n\n", "/", " — ", "...", "\u3000", ")("])


@pytest.mark.parametrize(
    "word",
    [
        pytest.param(WORDS, id="letters"),
        pytest.param(WORDS | MARKED_WORDS, id="letters and marks"),
    ],
)
@examples
@given(st.data(), SHUFFLES)
def test_kept_words_never_run_together(
    backbone: Backbone, word: st.SearchStrategy[str], data: st.DataObject, shuffle: random.Random
) -> None:
    text = "".join(itertools.chain.from_iterable(data.draw(st.lists(st.tuples(word, GAPS), max_size=20))))
    spans = backbone.encode(text).spans
    units = word_units(text, spans).tolist()
    kept = some(spans, units, shuffle)
    places = characters(kept)
    expected = [match.group() for match in regex.finditer(r"\w+", text) if match.start() in places]
    assert regex.findall(r"\w+", joined(text, kept)[0]) == expected


@examples
@given(TEXTS, st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), max_size=4))
def test_tokens_within_share_a_character_with_a_range(
    backbone: Backbone, text: str, lengths: list[tuple[int, int]]
) -> None:
    spans = backbone.encode(text).spans
    ranges = [(start, start + length) for start, length in lengths]
    protected = characters(ranges)
    assert tokens_within(spans, ranges).tolist() == [bool(characters([span]) & protected) for span in spans]


def test_an_empty_range_protects_nothing() -> None:
    assert tokens_within([(0, 3)], [(1, 1)]).tolist() == [False]


def test_everything_and_nothing() -> None:
    spans = [(0, 3), (3, 7), (7, 8)]
    assert joined("one two!", spans) == ("one two!", ((0, 8),))
    assert joined("one two!", []) == ("", ())
    assert joined("", []) == ("", ())
    assert word_units("", []).tolist() == character_units([]).tolist() == []


def test_ranges_that_overlap_or_touch_become_one() -> None:
    assert joined("abcdef", [(0, 4), (1, 2), (3, 5)]) == ("abcde", ((0, 5),))
    assert joined("abcdef", [(1, 4), (1, 2), (4, 5)]) == ("bcde", ((1, 5),))


@pytest.mark.parametrize("size", [1, MAX_UNIT_TOKENS, MAX_UNIT_TOKENS + 1, 200])
def test_an_endless_word_is_cut_between_its_tokens(size: int) -> None:
    units = word_units("x" * size, [(place, place + 1) for place in range(size)]).tolist()
    assert units == ([0] * size if size <= MAX_UNIT_TOKENS else list(range(size)))
