"""Soft tokens through the front door: budgets, the choice of a mode, answers, command line, evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ctxcompress import Backbone, CheckpointError, ConfigError, ContextCompressor, InputError, checkpoint
from ctxcompress.cli import app
from ctxcompress.config import SoftConfig
from ctxcompress.pooling import windows
from ctxcompress.soft import SoftCompressor

TEXTS = [
    "Rome is the capital of Italy and lies on the Tiber; it was not built in a day, as people say.",
    "Owls fly at night. They hunt mice and voles, and they turn their heads almost all the way round.",
    "",
    "Penicillin was discovered in London in 1928 by Alexander Fleming, who had left a dish uncovered.",
]
CONFIG = SoftConfig(ratio_set=(2, 4, 8), window=128, encoder_layers=2, converter_size=32, encoder_rank=4)


def adapter_for(base: Backbone, folder: Path, measured: dict[str, Any] | None = None) -> Path:
    torch.manual_seed(0)
    compressor = SoftCompressor(base, CONFIG)
    compressor.finish()
    checkpoint.save(compressor, folder, measured=measured)
    return folder


@pytest.fixture(scope="module")
def adapter(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_for(backbone, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def soft(backbone: Backbone, adapter: Path) -> ContextCompressor:
    return ContextCompressor(backbone, adapter=adapter)


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_a_ratio_of_the_set_is_met_in_every_document(soft: ContextCompressor, ratio: int) -> None:
    result = soft.compress(TEXTS, compression_ratio=ratio, mode="soft", allocator="uniform")
    assert result.mode == "soft"
    for document in result.documents:
        assert document.tokens_before == sum(chunk.tokens_before for chunk in document.chunks)
        assert document.tokens_after == sum(chunk.tokens_after for chunk in document.chunks)
        assert document.text == document.original
        for chunk in document.chunks:
            assert chunk.soft is not None
            assert len(chunk.soft) == chunk.tokens_after == windows(chunk.tokens_before, ratio)
            assert chunk.soft.fingerprint == soft.soft.fingerprint


@pytest.mark.parametrize("budget", [40, 60, 90, 300])
@pytest.mark.parametrize("allocator", ["dast", "random", "bm25"])
def test_budget_holds_and_raw_text_is_used_where_it_fits(
    soft: ContextCompressor, budget: int, allocator: Any
) -> None:
    result = soft.compress(
        TEXTS, "Who discovered penicillin?", budget=budget, mode="soft", allocator=allocator
    )
    assert result.tokens_after <= budget
    for document in result.documents:
        for chunk in document.chunks:
            assert (chunk.soft is None) == (chunk.tokens_after == chunk.tokens_before)
            assert chunk.tokens_after in {windows(chunk.tokens_before, ratio) for ratio in (1, 2, 4, 8)}
    assert len(result.parts()) == 3


def test_results_show_what_they_cost_and_no_numbers(soft: ContextCompressor) -> None:
    result = soft.compress(TEXTS, compression_ratio=4, mode="soft", allocator="uniform")
    shown = repr(result)
    assert shown.startswith(f"{result.tokens_before} tokens -> {result.tokens_after} (")
    assert shown.count("\n") == len(TEXTS)
    (chunk,) = result.documents[0].chunks
    decoder = soft.soft.fingerprint
    left, tokens = chunk.tokens_after, chunk.tokens_before
    assert repr(chunk.soft) == f"SoftTokens({left} for {tokens} tokens, decoder {decoder!r})"
    assert "tensor" not in repr(result.documents)


def test_chunks_are_weighed_as_they_stand_in_the_prompt(
    backbone: Backbone, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blank line follows each document, and nothing comes between its chunks."""
    soft = ContextCompressor(backbone, adapter=adapter, chunk_tokens=12)
    texts, read = [TEXTS[0], TEXTS[1]], []

    def reading(self: Backbone, documents: Any, *args: Any, **settings: Any) -> Any:
        read.extend(documents)
        return unpatched(self, documents, *args, **settings)

    unpatched = Backbone.read_queries
    monkeypatch.setattr(Backbone, "read_queries", reading)
    result = soft.compress(texts, "What flies?", compression_ratio=4, mode="soft")
    counts = [len(document.chunks) for document in result.documents]
    assert min(counts) > 1
    separator = len(backbone.encode("\n\n").ids)
    chunks = [chunk for document in result.documents for chunk in document.chunks]
    last = [place + 1 in {counts[0], sum(counts)} for place in range(sum(counts))]
    assert [len(rows) for rows in read] == [
        windows(chunk.tokens_before, 8) + separator * end for chunk, end in zip(chunks, last, strict=True)
    ]


@pytest.mark.parametrize("mode", ["text", "soft"])
def test_texts_that_were_cut_within_a_character_are_read(soft: ContextCompressor, mode: Any) -> None:
    texts = [f"\ud83d {TEXTS[0]}", f"{TEXTS[3]} \udc4d"]
    result = soft.compress(texts, "Who? \ud83d", compression_ratio=2, mode=mode)
    assert [document.original for document in result.documents] == texts
    assert soft.answer(result, max_new_tokens=2).text is not None


def test_dropping_needs_leave(soft: ContextCompressor) -> None:
    with pytest.raises(InputError, match="smallest sizes of"):
        soft.compress(TEXTS, "q", budget=5, mode="soft", allocator="uniform")
    result = soft.compress(TEXTS, "q", budget=5, mode="soft", allocator="uniform", allow_drop=True)
    assert result.tokens_after <= 5
    assert all(not document.text for document in result.documents if not document.tokens_after)


def test_answers_come_from_soft_tokens(soft: ContextCompressor) -> None:
    result = soft.compress(TEXTS, "Where is Rome?", compression_ratio=4, mode="soft")
    answer = soft.answer(result, max_new_tokens=5)
    full = soft.answer(
        soft.compress(TEXTS, "Where is Rome?", compression_ratio=1, mode="soft"), max_new_tokens=5
    )
    assert answer.prompt_tokens < full.prompt_tokens
    assert 0 < answer.completion_tokens <= 5


def test_protected_text_stays_text(soft: ContextCompressor) -> None:
    with pytest.raises(InputError, match="protected"):
        soft.compress(TEXTS, "q", budget=60, mode="soft", protected={"0": [(0, 4)]})


@pytest.mark.parametrize(("ratio", "mode"), [(2, "text"), (3, "soft"), (8, "soft"), (1, "text")])
def test_auto_takes_what_the_card_measured_as_better(
    backbone: Backbone, tmp_path: Path, ratio: int, mode: str
) -> None:
    # Nearest in logarithms: 3 is nearer to 4 (0.42 octaves) than to 2 (0.58).
    measured = {
        "2": {"text": 0.5, "soft": 0.4},
        "4": {"text": 0.3, "soft": 0.4},
        "8": {"text": 0.1, "soft": 0.2},
    }
    compressor = ContextCompressor(backbone, adapter=adapter_for(backbone, tmp_path, measured))
    assert compressor.compress(TEXTS, "q", compression_ratio=ratio, allocator="uniform").mode == mode
    with pytest.raises(InputError, match="smallest sizes"):  # 100 is nearest to 8: soft, which ends at 8
        compressor.compress(TEXTS, "q", compression_ratio=100, allocator="uniform")


def test_auto_is_text_without_measurements_or_adapter(soft: ContextCompressor, backbone: Backbone) -> None:
    for compressor in (soft, ContextCompressor(backbone)):
        assert compressor.compress(TEXTS, "q", compression_ratio=4).mode == "text"


def test_a_foreign_adapter_is_refused(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    other = ContextCompressor.from_pretrained(tmp_path, device="cpu", adapter=adapter)
    with pytest.raises(CheckpointError, match="was trained on"):
        other.compress(TEXTS, "q", compression_ratio=4, mode="soft")


def test_no_adapter_says_so(tiny_model: Path) -> None:
    compressor = ContextCompressor.from_pretrained(tiny_model, device="cpu")
    with pytest.raises(ConfigError, match="adapter=FOLDER"):
        compressor.compress(TEXTS, "q", compression_ratio=4, mode="soft")


def test_rows_of_an_evaluation_share_the_adapted_decoder(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    documents = [{"title": "t", "text": text, "is_gold": place == 3} for place, text in enumerate(TEXTS)]
    record = {"id": "1", "question": "Who?", "answers": ["Fleming"], "documents": documents}
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps(record) + "\n", encoding="utf-8")
    command = ["evaluate", "--task", task, "--rows", "full,text:uniform,soft:uniform", "--ratio", 4]
    command += ["--chunk-tokens", 128]  # every document is one chunk
    command += [
        "--model",
        tiny_model,
        "--adapter",
        adapter,
        "--output",
        tmp_path / "run",
        "--max-new-tokens",
        4,
    ]
    outcome = CliRunner().invoke(app, [*map(str, command), "--json"])
    assert outcome.exit_code == 0, outcome.stderr
    results = json.loads(outcome.stdout)
    assert results["config"]["settings"]["adapter"]
    assert results["config"]["settings"]["chunk_tokens"] == 128
    by_row = {row["row"]: row for row in results["rows"]}
    assert by_row["soft:uniform"]["tokens_mean"] == sum(
        windows(Backbone.from_pretrained(tiny_model, device="cpu").count(f"t\n{text}"), 4) for text in TEXTS
    )
