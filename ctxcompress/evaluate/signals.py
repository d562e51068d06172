"""Labelled questions -> every signal of every document or chunk, for `calibrate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from ctxcompress.allocators import GlobalAttention, bm25_scores
from ctxcompress.calibration import Observation
from ctxcompress.evaluate.metrics import contains_answer
from ctxcompress.methods.dac import Progress
from ctxcompress.pipeline import ContextCompressor
from ctxcompress.shrink import chunk_request, requested
from ctxcompress.tasks import Question
from ctxcompress.types import Document


def observe(
    compressor: ContextCompressor,
    questions: Sequence[Question],
    progress: Progress | None = None,
    *,
    soft: bool = False,
) -> Iterator[Observation]:
    """Signals of each question that has gold and other documents; the rest teach nothing and are left out.

    Args:
        compressor: reads.
        questions: with gold documents.
        progress: told after each.
        soft: read the soft tokens of the documents' chunks with the adapter's decoder, as the allocator
            `dast` does in soft mode.
    """
    for number, question in enumerate(questions):
        if progress is not None:
            progress("reading questions", number, len(questions))
        if any(question.gold) and not all(question.gold):
            yield _observation(compressor, question, soft)
    if progress is not None:
        progress("reading questions", len(questions), len(questions))


def with_scores(compressor: ContextCompressor, question: Question) -> tuple[Document, ...]:
    """The documents with the embedder's similarity as the score a retriever would have returned."""
    similarities = compressor.embedder.similarities(
        question.question, [document.text for document in question.documents]
    )
    return tuple(
        dataclasses.replace(document, score=score)
        for document, score in zip(question.documents, similarities, strict=True)
    )


def _observation(compressor: ContextCompressor, question: Question, soft: bool) -> Observation:
    documents = with_scores(compressor, question)
    encodings = [compressor.backbone.encode(document.text) for document in documents]
    if soft:
        stored = compressor.indexer.read([document.text for document in documents], encodings)
        request = chunk_request(documents, stored, compressor.soft, question.question)
        attention = GlobalAttention(compressor.soft_dast, compressor.soft)
        of_gold = [gold for gold, own in zip(question.gold, stored, strict=True) for _ in own.chunks]
        # A gold document holds the answer in some of its chunks; where none has its very words, all count.
        answering = [
            gold and contains_answer(text, question.answers)
            for gold, text in zip(of_gold, request.texts, strict=True)
        ]
        gold = answering if any(answering) else of_gold
    else:
        request = requested(documents, encodings, question.question)
        attention = GlobalAttention(compressor.dast, None)
        gold = list(question.gold)
    question_LHN, baseline_LHN = attention.masses(request)
    return Observation(
        question_LHN=question_LHN,
        baseline_LHN=baseline_LHN,
        prior_N=torch.tensor(request.retrieved, dtype=torch.float64),
        embedding_N=torch.tensor(
            compressor.embedder.similarities(question.question, request.texts), dtype=torch.float64
        ),
        bm25_N=bm25_scores(question.question, request.texts),
        gold_N=torch.tensor(gold, dtype=torch.bool),
    )
