"""Who gets how much: interchangeable ways to turn documents and a query into shares of the budget.

Every allocator sees the same inputs and returns the same thing, so an ablation is a name.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import regex
import torch
from torch import Tensor

from ctxcompress.calibration import BUDGET_TEMPERATURE
from ctxcompress.config import AllocatorName
from ctxcompress.embedder import Embedder
from ctxcompress.errors import MissingExtraError
from ctxcompress.methods.dast import DAST, Worth
from ctxcompress.scores import shares, standardised
from ctxcompress.types import Document

_WORDS = regex.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Request:
    """What an allocator decides on; documents without tokens are not among them."""

    documents: Sequence[Document]
    ids: Sequence[Sequence[int]]
    query: str


class Allocator(Protocol):
    """Weighs the documents of one request."""

    needs_query: bool

    def worth(self, request: Request) -> Worth:
        """Shares of the documents; sums to 1."""
        ...


class Uniform:
    """Every document the same ratio: shares follow lengths."""

    needs_query = False

    def worth(self, request: Request) -> Worth:
        """See `Allocator`."""
        lengths_N = torch.tensor([len(ids) for ids in request.ids], dtype=torch.float64)
        return Worth(lengths_N / lengths_N.sum())


class Random:
    """Shares drawn uniformly from all possible ones (a flat Dirichlet); the same for one seed and query."""

    needs_query = False

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def worth(self, request: Request) -> Worth:
        """See `Allocator`."""
        draw = random.Random(f"{self._seed} {request.query}")
        draws = torch.tensor([draw.expovariate(1.0) for _ in request.documents], dtype=torch.float64)
        return Worth(draws / draws.sum())


class BM25:
    """Softmax of standardised BM25 scores: words shared with the query, rare ones more."""

    needs_query = True

    def __init__(self, weight: float) -> None:
        self._weight = weight

    def worth(self, request: Request) -> Worth:
        """See `Allocator`."""
        scores = bm25_scores(request.query, [document.text for document in request.documents])
        return Worth(shares(self._weight * standardised(scores), BUDGET_TEMPERATURE))


class Embedding:
    """Softmax of standardised cosine similarities between query and document."""

    needs_query = True

    def __init__(self, embedder: Embedder, weight: float) -> None:
        self._embedder = embedder
        self._weight = weight

    def worth(self, request: Request) -> Worth:
        """See `Allocator`."""
        similarities = self._embedder.similarities(
            request.query, [document.text for document in request.documents]
        )
        scores = standardised(torch.tensor(similarities, dtype=torch.float64))
        return Worth(shares(self._weight * scores, BUDGET_TEMPERATURE))


class GlobalAttention:
    """DAST's scores."""

    needs_query = True

    def __init__(self, dast: DAST) -> None:
        self._dast = dast

    def worth(self, request: Request) -> Worth:
        """See `Allocator`."""
        return self._dast.worth(
            request.ids, request.query, [document.score for document in request.documents]
        )


def make_allocator(name: AllocatorName, *, dast: DAST, embedder: Embedder, seed: int) -> Allocator:
    """The allocator called `name`."""
    made: dict[AllocatorName, Allocator] = {
        "dast": GlobalAttention(dast),
        "uniform": Uniform(),
        "random": Random(seed),
        "bm25": BM25(dast.calibration.bm25),
        "embedding": Embedding(embedder, dast.calibration.embedding),
    }
    return made[name]


def bm25_scores(query: str, texts: Sequence[str]) -> Tensor:
    """BM25+ score of every text for the query, (N,) float64 >= 0.

    Raises:
        MissingExtraError: rank-bm25 is not installed.
    """
    try:
        from rank_bm25 import BM25Plus
    except ModuleNotFoundError as error:
        raise MissingExtraError("rank-bm25", "retrieval") from error
    corpus = [_WORDS.findall(text.casefold()) for text in texts]
    if not any(corpus):
        return torch.zeros(len(texts), dtype=torch.float64)
    return torch.tensor(BM25Plus(corpus).get_scores(_WORDS.findall(query.casefold())), dtype=torch.float64)
