"""Labelled questions -> every signal of every document, for `calibrate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ctxcompress.allocators import bm25_scores
from ctxcompress.calibration import Observation
from ctxcompress.embedder import Embedder
from ctxcompress.methods.dac import Progress
from ctxcompress.methods.dast import DAST
from ctxcompress.pipeline import ContextCompressor
from ctxcompress.tasks import Question


def observe(
    compressor: ContextCompressor, questions: Sequence[Question], progress: Progress | None = None
) -> Iterator[Observation]:
    """Signals of each question that has gold and other documents; the rest teach nothing and are left out."""
    dast, embedder = DAST(compressor.backbone), compressor.embedder
    for number, question in enumerate(questions):
        if progress is not None:
            progress("reading questions", number, len(questions))
        if any(question.gold) and not all(question.gold):
            yield _observation(compressor, dast, embedder, question)
    if progress is not None:
        progress("reading questions", len(questions), len(questions))


def _observation(
    compressor: ContextCompressor, dast: DAST, embedder: Embedder, question: Question
) -> Observation:
    texts = [document.text for document in question.documents]
    question_LHN, baseline_LHN = dast.masses(
        [compressor.backbone.encode(text).ids for text in texts], question.question
    )
    return Observation(
        question_LHN=question_LHN,
        baseline_LHN=baseline_LHN,
        prior_N=torch.tensor(embedder.similarities(question.question, texts), dtype=torch.float64),
        bm25_N=bm25_scores(question.question, texts),
        gold_N=torch.tensor(question.gold),
    )
