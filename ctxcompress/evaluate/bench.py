"""How much sooner the first token comes: full text against soft tokens from the store, in one run.

Every figure is a median of wall seconds on one machine; the documents are encoded before the clock starts,
as they are at index time.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from ctxcompress.config import AllocatorName
from ctxcompress.methods.dac import Progress
from ctxcompress.pipeline import ContextCompressor
from ctxcompress.prompt import question_prompt
from ctxcompress.types import Document

QUESTION = "Which of these documents says when the bridge over the river was built?"


def bench_queries(
    compressor: ContextCompressor,
    counts: Sequence[int],
    *,
    compression_ratio: float = 8.0,
    tokens: int = 150,
    repetitions: int = 5,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Seconds to the first token for several numbers of documents.

    Args:
        compressor: with an adapter.
        counts: numbers of documents.
        compression_ratio: of the soft rows.
        tokens: of each document.
        repetitions: runs of each row, taken in turn; their medians are returned.
        progress: told after each run.

    Returns:
        One row per count: "documents", "tokens", "soft_tokens", "seconds_full", "seconds_uniform",
        "seconds_dast", "seconds_dast_own" (scoring, budgets and all else before the prompt of the dast row),
        and the ratios "sooner_uniform", "sooner_dast" and "dast_own_of_full".
    """
    rows = []
    for count in counts:
        documents = _documents(compressor, count, tokens)
        compressor.index(documents)
        runs: dict[str, list[float]] = {"full": [], "uniform": [], "dast": [], "dast_own": []}
        soft_tokens = 0
        for repetition in range(repetitions + 1):
            for name, run in _rows(compressor, documents, compression_ratio).items():
                seconds, own, left = run()
                if not repetition:
                    continue  # the first round only warms up
                runs[name].append(seconds)
                if name == "dast":
                    runs["dast_own"].append(own)
                    soft_tokens = left
            if progress is not None:
                progress(f"{count} documents", repetition, repetitions)
        medians = {f"seconds_{name}": statistics.median(values) for name, values in runs.items()}
        rows.append(
            {
                "documents": count,
                "tokens": sum(compressor.backbone.count(document.text) for document in documents),
                "soft_tokens": soft_tokens,
                **medians,
                "sooner_uniform": medians["seconds_full"] / medians["seconds_uniform"],
                "sooner_dast": medians["seconds_full"] / medians["seconds_dast"],
                "dast_own_of_full": medians["seconds_dast_own"] / medians["seconds_full"],
            }
        )
    return rows


_Run = Callable[[], tuple[float, float, int]]


def _rows(compressor: ContextCompressor, documents: Sequence[Document], ratio: float) -> dict[str, _Run]:
    def full() -> tuple[float, float, int]:
        started = time.perf_counter()
        prompt = question_prompt(compressor.backbone, QUESTION, [[document.text] for document in documents])
        compressor.decoder(adapted=True).generate(prompt, max_new_tokens=1)
        return time.perf_counter() - started, 0.0, 0

    def soft(allocator: AllocatorName) -> tuple[float, float, int]:
        started = time.perf_counter()
        result = compressor.compress(
            documents, QUESTION, compression_ratio=ratio, mode="soft", allocator=allocator
        )
        own = time.perf_counter() - started
        prompt = question_prompt(compressor.backbone, QUESTION, result.parts())
        compressor.decoder(adapted=True).generate(prompt, max_new_tokens=1)
        return time.perf_counter() - started, own, result.tokens_after

    return {"full": full, "uniform": lambda: soft("uniform"), "dast": lambda: soft("dast")}


def _documents(compressor: ContextCompressor, count: int, tokens: int) -> list[Document]:
    """Texts of words drawn from the vocabulary, all different: time follows lengths, not meaning."""
    backbone = compressor.backbone
    words = sorted(word for word in backbone.tokenizer.get_vocab() if word.isalpha() and word.isascii())
    documents = []
    for place in range(count):
        text = " ".join(random.Random(place).choices(words, k=tokens))
        documents.append(Document(text[: backbone.encode(text).spans[tokens - 1][1]], id=str(place)))
    return documents
