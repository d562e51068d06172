"""Labelled questions -> every signal of every document, for `calibrate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ctxcompress.allocators import bm25_scores
from ctxcompress.backbone import Ids
from ctxcompress.calibration import Observation
from ctxcompress.methods.dac import Progress
from ctxcompress.methods.dast import DAST
from ctxcompress.pipeline import ContextCompressor
from ctxcompress.tasks import Question


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
        soft: read the documents' soft tokens with the adapter's decoder, as the allocator `dast` does in soft
            mode.
    """
    for number, question in enumerate(questions):
        if progress is not None:
            progress("reading questions", number, len(questions))
        if any(question.gold) and not all(question.gold):
            yield _observation(compressor, question, soft)
    if progress is not None:
        progress("reading questions", len(questions), len(questions))


def _observation(compressor: ContextCompressor, question: Question, soft: bool) -> Observation:
    texts = [document.text for document in question.documents]
    ids = [compressor.backbone.encode(text).ids for text in texts]
    documents: list[Ids | Tensor] = [*ids]
    dast = DAST(compressor.backbone)
    if soft:
        dast = DAST(compressor.soft.decoder, None, compressor.dast.calibration, as_asked=True)
        ratio = dast.scoring_ratio(list(map(len, ids)), compressor.soft.config.ratio_set)
        documents = [tokens.embeddings_MD for tokens in compressor.soft.soften(ids, [ratio] * len(ids))]
    question_LHN, baseline_LHN = dast.masses(documents, question.question)
    return Observation(
        question_LHN=question_LHN,
        baseline_LHN=baseline_LHN,
        prior_N=torch.tensor(compressor.embedder.similarities(question.question, texts), dtype=torch.float64),
        bm25_N=bm25_scores(question.question, texts),
        gold_N=torch.tensor(question.gold),
    )
