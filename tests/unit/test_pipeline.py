"""The front door: budgets met, documents kept apart, bad input named."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ctxcompress import (
    DAC,
    Backbone,
    ConfigError,
    ContextCompressor,
    DACConfig,
    DASTConfig,
    Document,
    InputError,
    arranged,
)

ALLOCATORS = ("dast", "uniform", "random", "bm25")
TEXTS = [
    "Rome is the capital of Italy. It lies on the Tiber and was founded in 753 BC, says the legend.",
    "Owls hunt at night and turn their heads far around; they hear mice under snow and fly without a sound.",
    "",
    "Paris is the capital of France. The Seine runs through it, and the Eiffel Tower was finished in 1889.",
]


def documents() -> list[Document]:
    return [
        Document(
            text, id=f"d{place}", score=1 - place / 10, metadata={"source": f"{place}.md", "any": object()}
        )
        for place, text in enumerate(TEXTS)
    ]


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("ratio", [1, 1.5, 4, 10])
def test_budget_is_met_and_documents_keep_what_is_theirs(
    compressor: ContextCompressor, backbone: Backbone, allocator: Any, ratio: float
) -> None:
    given = documents()
    result = compressor.compress(
        given, "What is the capital of Italy?", compression_ratio=ratio, allocator=allocator
    )
    assert result.tokens_after <= result.budget == int(result.tokens_before / ratio)
    assert sum(backbone.count(document.text) for document in result.documents) == result.tokens_after
    for before, after in zip(given, result.documents, strict=True):
        assert (after.id, after.score, after.original) == (before.id, before.score, before.text)
        assert after.metadata is before.metadata
        assert after.tokens_after <= after.budget
        assert after.text == "".join(before.text[start:stop] for start, stop in after.kept_spans)
        assert bool(after.text) == bool(before.text)
    assert given == [*given]
    json.dumps(result.to_dict())


def test_text_that_fits_is_left_alone(compressor: ContextCompressor) -> None:
    result = compressor.compress(TEXTS, "Where?", budget=10_000)
    assert [document.text for document in result.documents] == TEXTS
    assert {document.share for document in result.documents} == {None}


def test_shares_sum_to_one_and_ranks_follow(compressor: ContextCompressor) -> None:
    result = compressor.compress(documents(), "capital of Italy", compression_ratio=3, allocator="bm25")
    assert sum(document.share for document in result.documents) == pytest.approx(1)
    by_rank = sorted(result.documents, key=lambda document: document.rank)
    assert [document.rank for document in by_rank] == [1, 2, 3, 4]
    assert by_rank[0].id == "d0"
    assert [document.share for document in by_rank] == sorted((d.share for d in by_rank), reverse=True)


def test_random_allocator_repeats_with_its_seed(backbone: Backbone) -> None:
    def counts(seed: int) -> list[int]:
        compressor = ContextCompressor(backbone, seed=seed)
        result = compressor.compress(TEXTS, compression_ratio=2, allocator="random")
        return [document.budget for document in result.documents]

    assert counts(1) == counts(1) != counts(2)


def test_prior_takes_part_only_when_every_document_has_a_score(backbone: Backbone) -> None:
    compressor = ContextCompressor(backbone)
    scored = compressor.compress(documents(), "Where?", compression_ratio=2)
    bare = compressor.compress(TEXTS, "Where?", compression_ratio=2)
    ignored = ContextCompressor(backbone, dast=DASTConfig(prior="none")).compress(
        documents(), "Where?", compression_ratio=2
    )
    equal = [dataclasses.replace(document, score=0.5) for document in documents()]
    untold = compressor.compress(equal, "Where?", compression_ratio=2)
    assert (scored.prior, bare.prior, ignored.prior) == ("retriever", "none", "none")
    # Scores that are all equal say nothing: attention counts as it does alone.
    assert untold.prior == "none"
    assert [document.share for document in untold.documents] == [
        document.share for document in bare.documents
    ]
    assert [document.share for document in bare.documents] == [
        document.share for document in ignored.documents
    ]
    assert scored.documents[0].rank == 1


@pytest.mark.parametrize("mode", ["paper", "scaled"])
def test_printed_modes_run_and_paper_is_nearly_uniform(backbone: Backbone, mode: Any) -> None:
    compressor = ContextCompressor(backbone, dast=DASTConfig(mode=mode))
    shares = [
        d.share
        for d in compressor.compress(documents(), "Where?", compression_ratio=2).documents
        if d.original
    ]
    spread = max(shares) / min(shares)
    assert (spread < math.e) if mode == "paper" else (spread > 1)


def test_dropping_is_only_done_when_asked(compressor: ContextCompressor) -> None:
    sharp = [Document(text, id=str(place), score=float(place == 0)) for place, text in enumerate(TEXTS)]
    kept = compressor.compress(sharp, "Where is Rome?", budget=15, allocator="bm25")
    assert all(document.text for document in kept.documents if document.original)
    dropped = compressor.compress(sharp, "Tiber", budget=2, allocator="bm25", allow_drop=True)
    assert any(not document.text for document in dropped.documents if document.original)


def test_protected_spans_survive_a_hard_budget(compressor: ContextCompressor) -> None:
    start = TEXTS[1].index("hear mice")
    protected = {"d1": [(start, start + len("hear mice"))]}
    result = compressor.compress(documents(), "Rome", budget=24, allocator="bm25", protected=protected)
    assert "hear mice" in result.documents[1].text
    assert result.tokens_after <= 24
    with pytest.raises(InputError, match="protected"):
        compressor.compress(documents(), "Rome", budget=9, protected={"d1": [(0, len(TEXTS[1]))]})


async def test_async_gives_the_same(compressor: ContextCompressor) -> None:
    expected = compressor.compress(documents(), "Where is Rome?", compression_ratio=3)
    results = await asyncio.gather(
        *(compressor.acompress(documents(), "Where is Rome?", compression_ratio=3) for _ in range(3))
    )
    assert [[d.text for d in r.documents] for r in results] == [[d.text for d in expected.documents]] * 3


def test_answer_accounts_for_its_tokens(compressor: ContextCompressor) -> None:
    answer = compressor.answer(compressor.compress(TEXTS, "Where is Rome?", budget=40), max_new_tokens=3)
    assert answer.completion_tokens <= 3
    assert answer.prompt_tokens > answer.result.tokens_after
    assert set(answer.seconds) == {"score", "compress", "decode"}


def test_empty_list_is_an_empty_result(compressor: ContextCompressor) -> None:
    result = compressor.compress([], "Where?", budget=10)
    assert (result.documents, result.tokens_after, result.compression_ratio, result.text) == ((), 0, None, "")


def test_documents_without_any_text(compressor: ContextCompressor) -> None:
    result = compressor.compress(["", ""], "Where?", compression_ratio=4)
    assert [document.text for document in result.documents] == ["", ""]


def test_notebook_table_escapes_ids(compressor: ContextCompressor) -> None:
    table = compressor.compress([Document("a b c", id="<script>")], "q", budget=2)._repr_html_()
    assert "&lt;script&gt;" in table
    assert "<script>" not in table


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"documents": TEXTS, "query": "", "budget": 9}, InputError, "dast needs a query"),
    ({"documents": TEXTS, "query": "  ", "budget": 9, "allocator": "bm25"}, InputError, "needs a query"),
    ({"documents": TEXTS, "query": 3, "budget": 9}, InputError, "query must be a string"),
    (
        {"documents": ["a", Document("b", id="0")], "query": "q", "budget": 9},
        InputError,
        "unique.*positions 0 and 1",
    ),
    ({"documents": TEXTS, "query": "q", "budget": 0}, InputError, "budget must be a whole number.*got 0"),
    ({"documents": TEXTS, "query": "q", "budget": 2.5}, InputError, "got 2.5"),
    ({"documents": TEXTS, "query": "q", "budget": 2}, InputError, "budget must be >= 3"),
    ({"documents": TEXTS, "query": "q", "compression_ratio": 0.25}, ConfigError, "to keep 25% write 4"),
    ({"documents": TEXTS, "query": "q", "compression_ratio": math.nan}, ConfigError, "got nan"),
    ({"documents": TEXTS, "query": "q", "compression_ratio": -1}, ConfigError, "got -1"),
    ({"documents": TEXTS, "query": "q"}, ConfigError, "got none"),
    (
        {"documents": TEXTS, "query": "q", "budget": 9, "compression_ratio": 2},
        ConfigError,
        "got budget and compression_ratio",
    ),
    ({"documents": TEXTS, "query": "q", "budget": 9, "mode": "soft"}, ConfigError, "train one with"),
    ({"documents": TEXTS, "query": "q", "budget": 9, "mode": "hard"}, ConfigError, "mode must be one of"),
    (
        {"documents": TEXTS, "query": "q", "budget": 9, "allocator": "best"},
        ConfigError,
        "allocator must be one of",
    ),
    ({"documents": "one text", "query": "q", "budget": 9}, InputError, "put it in a list"),
    ({"documents": [b"bytes"], "query": "q", "budget": 9}, InputError, "got bytes"),
    ({"documents": [{"page": "x"}], "query": "q", "budget": 9}, InputError, "must have the key 'text'"),
    ({"documents": [Document("x", score=math.nan)], "query": "q", "budget": 9}, InputError, "NaN"),
    ({"documents": TEXTS, "query": "q", "budget": 9, "protected": {"x": []}}, InputError, "'x'"),
    (
        {"documents": TEXTS, "query": "q", "budget": 9, "protected": {"0": [(5, 999)]}},
        InputError,
        "characters",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
def test_bad_input_is_named(
    compressor: ContextCompressor, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compressor.compress(**arguments)


def test_pipeline_refuses_pruning_that_may_exceed_the_budget(backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="never exceeds its budget"):
        ContextCompressor(backbone, dac=DACConfig(schedule="reference"))
    assert DAC(backbone, DACConfig(schedule="reference"))


@pytest.mark.parametrize(
    "wrong", [{"alpha": -0.1}, {"mode": "best"}, {"temperature": 0.0}, {"ppl_sign": 2}, {"prior": "bm25"}]
)
def test_wrong_dast_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        DASTConfig(**wrong)


def test_many_documents_beyond_the_window(compressor: ContextCompressor) -> None:
    many = [
        f"Document number {number} tells of the river {number * 7} and its bridges." for number in range(60)
    ]
    result = compressor.compress(many, "Which river?", compression_ratio=3)
    assert result.tokens_before > compressor.backbone.window
    assert result.tokens_after <= result.budget


def test_random_shares_change_with_the_query_and_repeat_with_the_seed(compressor: ContextCompressor) -> None:
    drawn = [
        [
            document.share
            for document in compressor.compress(
                TEXTS, query, compression_ratio=2, allocator="random"
            ).documents
        ]
        for query in ("Where?", "Where?", "When?")
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_equal_settings_share_one_compressor(tiny_model: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        loaded = list(
            pool.map(
                lambda name: ContextCompressor.shared(name, device="cpu"), [tiny_model, str(tiny_model)] * 2
            )
        )
    assert len(set(map(id, loaded))) == 1
    other = ContextCompressor.shared(tiny_model, device="cpu", store=tmp_path / "store")
    assert other is not loaded[0]
    assert other.references is not loaded[0].references


@pytest.mark.parametrize(("order", "expected"), [("original", "bacd"), ("score", "dcba"), ("edges", "bdca")])
def test_documents_stand_in_the_order_asked(order: Any, expected: str) -> None:
    assert "".join(arranged("bacd", [0.3, 0.4, 0.2, None], order)) == expected
