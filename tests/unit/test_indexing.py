"""Index time and query time: encoded once, exact at every ratio, only what is new is encoded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ctxcompress import Backbone, ConfigError, ContextCompressor, DASTConfig, InputError, checkpoint
from ctxcompress.config import Features, SoftConfig
from ctxcompress.indexing import Indexer, encoded_chunks
from ctxcompress.soft import SoftCompressor
from ctxcompress.store import SoftTokenStore

TEXTS = [
    "Rome is the capital of Italy and lies on the Tiber; it was not built in a day, as people say.",
    "Owls fly at night. They hunt mice and voles, and they turn their heads almost all the way round.",
    "",
    "Penicillin was discovered in London in 1928 by Alexander Fleming, who had left a dish uncovered.",
]
QUERY = "Who discovered penicillin?"


def compressor_of(base: Backbone, features: Features = "mean_pool", **settings: Any) -> SoftCompressor:
    torch.manual_seed(0)
    config = SoftConfig(
        features=features,
        ratio_set=(2, 4, 8),
        window=64,
        encoder_layers=2,
        converter_size=32,
        encoder_rank=4,
        **settings,
    )
    compressor = SoftCompressor(base, config)
    with torch.no_grad():
        compressor.converter.scale.fill_(1.0)
    compressor.finish()
    return compressor


def indexed(indexer: Indexer, base: Backbone, texts: list[str], **settings: Any) -> list[Any]:
    return indexer.read(texts, [base.encode(text) for text in texts], **settings)


@pytest.fixture
def soft(backbone: Backbone) -> SoftCompressor:
    return compressor_of(backbone)


@pytest.fixture
def pipeline(backbone: Backbone, tmp_path: Path, soft: SoftCompressor) -> ContextCompressor:
    checkpoint.save(soft, tmp_path / "adapter")
    return ContextCompressor(backbone, adapter=tmp_path / "adapter", store=tmp_path / "store")


@pytest.mark.parametrize("ratio", [2, 4, 8])
@pytest.mark.parametrize("settings", [{}, {"pool_end_token": True}, {"window_alignment": "end"}], ids=str)
def test_soft_tokens_from_the_store_are_those_of_a_fresh_encoding(
    backbone: Backbone, tmp_path: Path, ratio: int, settings: dict[str, Any]
) -> None:
    soft = compressor_of(backbone, **settings)
    with SoftTokenStore(tmp_path, dtype="float32") as store:
        indexed(Indexer(backbone, soft, store), backbone, TEXTS)
    with SoftTokenStore(tmp_path, readonly=True) as store:
        for text, document in zip(
            TEXTS, indexed(Indexer(backbone, soft, store), backbone, TEXTS), strict=True
        ):
            chunks = [text[slice(*chunk.span)] for chunk in document.chunks]
            assert "".join(chunks) == text
            encoded = encoded_chunks(document, soft)
            for own, chunk in zip(encoded, chunks, strict=True):
                ids = backbone.encode(chunk).ids
                (fresh,) = soft.soften([ids], [ratio])
                stored = soft.soft_tokens(own, ratio)
                assert len(stored) == soft.size(len(ids), ratio)
                torch.testing.assert_close(stored.embeddings_MD, fresh.embeddings_MD, atol=1e-5, rtol=0)


def test_only_new_texts_are_encoded(
    backbone: Backbone, soft: SoftCompressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexer = Indexer(backbone, soft, SoftTokenStore())
    seen: list[int] = []
    encode = soft.encode
    monkeypatch.setattr(
        soft, "encode", lambda texts, ratio=None: seen.append(len(texts)) or encode(texts, ratio)
    )
    indexed(indexer, backbone, [TEXTS[0], TEXTS[0]])
    first = sum(seen)
    indexed(indexer, backbone, TEXTS)
    indexed(indexer, backbone, TEXTS)
    chunks = [len(document.chunks) for document in indexed(indexer, backbone, TEXTS)]
    assert first == chunks[0]
    assert sum(seen) == sum(chunks)


def test_nll_is_added_when_it_is_needed(backbone: Backbone, soft: SoftCompressor, tmp_path: Path) -> None:
    with SoftTokenStore(tmp_path) as store:
        indexer = Indexer(backbone, soft, store)
        assert all(math.isnan(chunk.nll) for own in indexed(indexer, backbone, TEXTS) for chunk in own.chunks)
        indexed(indexer, backbone, TEXTS, with_nll=True)
    with SoftTokenStore(tmp_path, readonly=True) as store:
        # It was kept: what comes back without asking has it, and it is the mean over each chunk's tokens.
        for text, own in zip(TEXTS, indexed(Indexer(backbone, soft, store), backbone, TEXTS), strict=True):
            (signals,) = backbone.token_signals([backbone.encode(text).ids])
            start = 0
            for chunk in own.chunks:
                mean = float(signals.nll_T[start : start + chunk.tokens].mean())
                assert chunk.nll == pytest.approx(mean, rel=1e-4)
                start += chunk.tokens


def test_other_weights_and_chunks_are_other_entries(backbone: Backbone, soft: SoftCompressor) -> None:
    store = SoftTokenStore()
    keys = {
        Indexer(backbone, soft, store).key("a"),
        Indexer(backbone, soft, store).key("b"),
        Indexer(backbone, soft, store, 32).key("a"),
        Indexer(
            backbone,
            compressor_of(backbone, residual=False),
            store,
        ).key("a"),
    }
    assert len(keys) == 4


@pytest.mark.parametrize("size", [0, 65])
def test_chunks_must_fit_the_encoder(backbone: Backbone, soft: SoftCompressor, size: int) -> None:
    with pytest.raises(ConfigError, match=r"chunk_tokens must be in \[1, 64\]"):
        Indexer(backbone, soft, SoftTokenStore(), size)


def test_a_second_process_encodes_nothing(
    pipeline: ContextCompressor, backbone: Backbone, tmp_path: Path
) -> None:
    assert pipeline.index(TEXTS) == 4
    assert pipeline.index(TEXTS) == 0
    first = pipeline.compress(TEXTS, QUERY, budget=60, mode="soft")
    pipeline.store.close()
    again = ContextCompressor(
        backbone, adapter=tmp_path / "adapter", store=SoftTokenStore(tmp_path / "store", readonly=True)
    )
    assert again.index(TEXTS) == 0
    second = again.compress(TEXTS, QUERY, budget=60, mode="soft")
    assert first.documents == second.documents
    for one, other in zip(first.parts(), second.parts(), strict=True):
        for part, same in zip(one, other, strict=True):
            assert (
                part == same if isinstance(part, str) else torch.equal(part.embeddings_MD, same.embeddings_MD)
            )  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["repaired", "scaled", "paper"])
def test_every_dast_mode_weighs_soft_tokens(
    backbone: Backbone, tmp_path: Path, soft: SoftCompressor, mode: Any
) -> None:
    checkpoint.save(soft, tmp_path)
    compressor = ContextCompressor(backbone, adapter=tmp_path, dast=DASTConfig(mode=mode))
    result = compressor.compress(TEXTS, QUERY, budget=60, mode="soft")
    shares = [document.share for document in result.documents]
    assert sum(share or 0 for share in shares) == pytest.approx(1)
    assert result.tokens_after <= 60
    if mode == "paper":
        # At temperature 1 chunks hardly differ.
        chunks = [chunk.share or 0 for document in result.documents for chunk in document.chunks]
        assert max(chunks) < 2 * min(chunks)


@pytest.mark.parametrize("features", ["last_tokens", "compression_tokens"])
def test_features_of_one_ratio_go_through_the_same_door(
    backbone: Backbone, tmp_path: Path, features: Features
) -> None:
    checkpoint.save(compressor_of(backbone, features), tmp_path)
    compressor = ContextCompressor(backbone, adapter=tmp_path)
    for allocator in ("uniform", "dast", "semi_dynamic"):
        result = compressor.compress(TEXTS, QUERY, budget=80, mode="soft", allocator=allocator)  # type: ignore[arg-type]
        assert 0 < result.tokens_after <= 80


@pytest.mark.parametrize("allocator", ["semi_dynamic", "dast+semi_dynamic"])
def test_the_dial_turns_one_way(pipeline: ContextCompressor, allocator: Any) -> None:
    totals = []
    for scale in (-8.0, -1.0, 0.0, 1.0, 2.0, 8.0):
        result = pipeline.compress(TEXTS, QUERY, ratio_scale=scale, mode="soft", allocator=allocator)
        assert result.ratio_scale == scale
        assert result.tokens_after == result.budget
        totals.append(result.tokens_after)
    assert totals == sorted(totals, reverse=True)
    assert totals[0] == result.tokens_before  # 1 is of the set
    chunks = [chunk for document in result.documents for chunk in document.chunks]
    assert totals[-1] == sum(pipeline.soft.size(chunk.tokens_before, 8) for chunk in chunks)


@pytest.mark.parametrize("allocator", ["semi_dynamic", "dast+semi_dynamic"])
@pytest.mark.parametrize("budget", [45, 60, 100])
def test_a_budget_finds_the_dial(pipeline: ContextCompressor, allocator: Any, budget: int) -> None:
    result = pipeline.compress(TEXTS, QUERY, budget=budget, mode="soft", allocator=allocator)
    assert result.tokens_after <= budget
    assert result.ratio_scale is not None
    same = pipeline.compress(TEXTS, QUERY, ratio_scale=result.ratio_scale, mode="soft", allocator=allocator)
    assert [d.tokens_after for d in same.documents] == [d.tokens_after for d in result.documents]
    gentler = pipeline.compress(
        TEXTS, QUERY, ratio_scale=result.ratio_scale - 1e-4, mode="soft", allocator=allocator
    )
    assert gentler.tokens_after > budget


@pytest.mark.parametrize("allocator", ["uniform", "dast", "semi_dynamic"])
def test_a_budget_below_the_least_says_what_works(pipeline: ContextCompressor, allocator: Any) -> None:
    with pytest.raises(InputError, match=r"budget must be >= (\d+)") as caught:
        pipeline.compress(TEXTS, QUERY, budget=3, mode="soft", allocator=allocator)
    least = int(str(caught.value).split(">= ")[1].split()[0])
    assert (
        pipeline.compress(TEXTS, QUERY, budget=least, mode="soft", allocator=allocator).tokens_after == least
    )
    dropped = pipeline.compress(TEXTS, QUERY, budget=12, mode="soft", allocator=allocator, allow_drop=True)
    assert 0 < dropped.tokens_after <= 12
    assert any(not chunk.tokens_after for document in dropped.documents for chunk in document.chunks)


def test_the_dial_counts_distances_as_the_adapter_says(backbone: Backbone, tmp_path: Path) -> None:
    # 2^1.55 = 2.93: halfway from 2 to 4 is 2.83 in logarithms, and 3 in numbers.
    chosen = {}
    for space in ("log", "linear"):
        soft = compressor_of(backbone, ratio_space=space)
        with torch.no_grad():
            soft.ratio_head.weight.zero_()
            soft.ratio_head.bias.fill_(1.55)
        soft.finish()
        checkpoint.save(soft, tmp_path / space)
        compressor = ContextCompressor(backbone, adapter=tmp_path / space)
        result = compressor.compress([TEXTS[0][:40]], ratio_scale=0.0, mode="soft", allocator="semi_dynamic")
        (chosen[space],) = (chunk.soft.ratio for chunk in result.documents[0].chunks if chunk.soft)
    assert chosen == {"log": 4, "linear": 2}


def test_document_budgets_are_sums_of_their_chunks(pipeline: ContextCompressor) -> None:
    result = pipeline.compress([" ".join(TEXTS) * 3, TEXTS[0]], QUERY, budget=90, mode="soft")
    assert len(result.documents[0].chunks) > 4
    for document in result.documents:
        assert document.tokens_after == document.budget == sum(c.tokens_after for c in document.chunks)
        assert document.share == pytest.approx(sum(c.share or 0 for c in document.chunks))
        assert document.tokens_before == sum(c.tokens_before for c in document.chunks)


def test_the_dial_belongs_to_semi_dynamic(pipeline: ContextCompressor) -> None:
    with pytest.raises(ConfigError, match="turns the dial"):
        pipeline.compress(TEXTS, QUERY, ratio_scale=1.0, mode="soft", allocator="dast")
    with pytest.raises(ConfigError, match="mode 'text'"):
        pipeline.compress(TEXTS, QUERY, budget=50, mode="text", allocator="semi_dynamic")
    with pytest.raises(ConfigError, match="ratio_scale must be a finite number"):
        pipeline.compress(TEXTS, QUERY, ratio_scale=math.inf, mode="soft", allocator="semi_dynamic")


def test_the_picture_shades_chunks(pipeline: ContextCompressor) -> None:
    result = pipeline.compress([" ".join(TEXTS) * 2, TEXTS[0]], QUERY, budget=60, mode="soft")
    page = result._repr_html_()
    assert page.count("background:") == sum(len(document.chunks) for document in result.documents)
    account = result.to_dict()
    assert [len(document["chunks"]) for document in account["documents"]] == [
        len(document.chunks) for document in result.documents
    ]


def test_orders_of_documents(pipeline: ContextCompressor) -> None:
    texts = [f"{name} {TEXTS[0]}" for name in "abcde"]
    result = pipeline.compress(texts, QUERY, budget=150, mode="soft", allocator="random")
    by_share = sorted(result.documents, key=lambda document: document.share or 0)
    best = [document.parts for document in by_share[::-1]]

    def shown(order: Any) -> list[Any]:
        return [[p if isinstance(p, str) else p.embeddings_MD for p in own] for own in result.parts(order)]

    def equal(one: Any, other: Any) -> bool:
        other = [p if isinstance(p, str) else p.embeddings_MD for p in other]
        return all(
            p == q if isinstance(p, str) else torch.equal(p, q) for p, q in zip(one, other, strict=True)
        )

    assert all(map(equal, shown("score"), best[::-1]))
    assert all(map(equal, shown("original"), [document.parts for document in result.documents]))
    # Best last, second best first, third next to the best, fourth next to the second.
    assert all(map(equal, shown("edges"), [best[1], best[3], best[4], best[2], best[0]]))
    with pytest.raises(ConfigError, match="order must be one of"):
        result.parts("best")  # type: ignore[arg-type]
