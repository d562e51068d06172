"""Who gets how much: interchangeable ways to turn documents and a query into shares of the budget.

Every allocator sees the same inputs and returns the same thing, so an ablation is a name.

Shapes: N units, which are documents or chunks of documents.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import regex
import torch
from torch import Tensor

from ctxcompress.backbone import Ids
from ctxcompress.calibration import BUDGET_TEMPERATURE
from ctxcompress.config import AllocatorName
from ctxcompress.embedder import Embedder
from ctxcompress.errors import ConfigError, MissingExtraError
from ctxcompress.methods.dast import DAST, Worth
from ctxcompress.scores import shares, standardised
from ctxcompress.soft import EncodedText, SoftCompressor

_WORDS = regex.compile(r"\w+")
LEAST_SHARE = 1e-9  # a chunk of no relevance at all asks for a large ratio, not for an infinite one


@dataclass(frozen=True, slots=True)
class Request:
    """What an allocator decides on: documents in text mode, their chunks in soft mode; none without tokens.

    Attributes:
        texts: of each unit.
        ids: token ids of each.
        retrieved: the retriever's score of each unit's document.
        query: the question, or "".
        encoded: soft mode: every chunk as the encoder left it.
        nll_N: soft mode, if the allocator wants it: mean NLL of every chunk.
        ends: soft mode: of every chunk, whether its document ends with it.
    """

    texts: Sequence[str]
    ids: Sequence[Ids]
    retrieved: Sequence[float | None]
    query: str
    encoded: Sequence[EncodedText] = ()
    nll_N: Tensor | None = None
    ends: Sequence[bool] | None = None


class Allocator(Protocol):
    """Weighs the units of one request."""

    needs_query: bool
    needs_nll: bool

    def worth(self, request: Request) -> Worth:
        """Shares of the units; sums to 1."""
        ...


class Uniform:
    """Every unit the same ratio: shares follow lengths."""

    needs_query = False
    needs_nll = False

    def worth(self, request: Request) -> Worth:
        """See `Allocator`."""
        return Worth(_lengths(request) / _lengths(request).sum())


class Random:
    """Shares drawn uniformly from all possible ones (a flat Dirichlet); the same for one seed and query."""

    needs_query = False
    needs_nll = False

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def worth(self, request: Request) -> Worth:
        """See `Allocator`."""
        draw = random.Random(f"{self._seed} {request.query}")
        draws = torch.tensor([draw.expovariate(1.0) for _ in request.texts], dtype=torch.float64)
        return Worth(draws / draws.sum())


class BM25:
    """Softmax of standardised BM25 scores: words shared with the query, rare ones more."""

    needs_query = True
    needs_nll = False

    def __init__(self, weight: float) -> None:
        self._weight = weight

    def worth(self, request: Request) -> Worth:
        """See `Allocator`."""
        scores = bm25_scores(request.query, request.texts)
        return Worth(shares(self._weight * standardised(scores), BUDGET_TEMPERATURE))


class Embedding:
    """Softmax of standardised cosine similarities between query and unit."""

    needs_query = True
    needs_nll = False

    def __init__(self, embedder: Embedder, weight: float) -> None:
        self._embedder = embedder
        self._weight = weight

    def worth(self, request: Request) -> Worth:
        """See `Allocator`."""
        similarities = self._embedder.similarities(request.query, request.texts)
        scores = standardised(torch.tensor(similarities, dtype=torch.float64))
        return Worth(shares(self._weight * scores, BUDGET_TEMPERATURE))


class GlobalAttention:
    """DAST's scores.

    Args:
        dast: reads token ids, or with `soft` the units' soft tokens.
        soft: the compressor in soft mode, else None.
    """

    needs_query = True

    def __init__(self, dast: DAST, soft: SoftCompressor | None) -> None:
        self._dast = dast
        self._soft = soft
        self.needs_nll = dast.needs_nll

    def worth(self, request: Request) -> Worth:
        """See `Allocator`."""
        return self._dast.worth(
            self._read(request), request.query, request.retrieved, request.nll_N, request.ends
        )

    def masses(self, request: Request) -> tuple[Tensor, Tensor]:
        """What the scores are made of, for `calibrate`: see `DAST.masses`."""
        return self._dast.masses(self._read(request), request.query, request.ends)

    def _read(self, request: Request) -> Sequence[Ids | Tensor]:
        """What the pass reads of each unit: all of its tokens, or coarse soft tokens."""
        if self._soft is None:
            return request.ids
        ratio = self._dast.scoring_ratio(list(map(len, request.ids)), self._soft.config.ratio_set)
        coarse = self._soft.soften(request.ids, [ratio] * len(request.ids), request.encoded)
        return [tokens.embeddings_MD for tokens in coarse]


class SemiDynamic:
    """Ratios that the ratio head predicts from how dense each text is, whatever is asked."""

    needs_query = False
    needs_nll = False

    def worth(self, request: Request) -> Worth:
        """See `Allocator`."""
        return _wishing(request, torch.zeros(len(request.texts), dtype=torch.float64))


class RelevantDensity:
    """DAST's relevance times the ratio head's density.

    A chunk of N with the predicted ratio 2^p and DAST's share w asks for 2^p / (N w): one that is worth twice
    the mean gets half its predicted ratio. The part of the budget it asks for is w times the chunk's tokens
    times 2^-p, normalised.
    """

    needs_query = True

    def __init__(self, relevance: GlobalAttention) -> None:
        self._relevance = relevance
        self.needs_nll = relevance.needs_nll

    def worth(self, request: Request) -> Worth:
        """See `Allocator`."""
        relevance = self._relevance.worth(request)
        worth = _wishing(request, torch.log2(len(request.texts) * relevance.shares_N.clamp(min=LEAST_SHARE)))
        return Worth(worth.shares_N, relevance.prior, worth.log2_ratios_N)


def make_allocator(
    name: AllocatorName, *, dast: DAST, embedder: Embedder, seed: int, soft: SoftCompressor | None = None
) -> Allocator:
    """The allocator called `name`.

    Args:
        name: of the allocator.
        dast: for the allocators with DAST.
        embedder: for `embedding`.
        seed: of `random`.
        soft: the compressor in soft mode, else None.

    Raises:
        ConfigError: it needs the ratio head, and the mode is text.
    """
    if "semi_dynamic" in name and soft is None:
        raise ConfigError(
            f"the allocator {name!r} follows the ratio head of a soft-token adapter, got mode 'text'; use "
            "mode='soft' or another allocator"
        )
    attention = GlobalAttention(dast, soft)
    made: dict[AllocatorName, Allocator] = {
        "dast": attention,
        "uniform": Uniform(),
        "random": Random(seed),
        "bm25": BM25(dast.calibration.bm25),
        "embedding": Embedding(embedder, dast.calibration.embedding),
        "semi_dynamic": SemiDynamic(),
        "dast+semi_dynamic": RelevantDensity(attention),
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


def _lengths(request: Request) -> Tensor:
    return torch.tensor([len(ids) for ids in request.ids], dtype=torch.float64)


def _wishing(request: Request, log2_relevance_N: Tensor) -> Worth:
    predicted_N = torch.tensor([text.log2_ratio for text in request.encoded], dtype=torch.float64)
    wishes_N = predicted_N - log2_relevance_N
    asked_N = (_lengths(request).log2() - wishes_N) * math.log(2)
    return Worth(asked_N.softmax(dim=0), log2_ratios_N=wishes_N)
