"""DAST (arXiv 2502.11493): what each document is worth for a query, from global attention and local NLL.

One pass over all documents, then a few tokens of question on top: [mass per document, NLL per document] ->
scores -> shares. Where we leave the paper: the printed signal (last token, all heads, temperature 1) ranks
documents no better than chance on small models and gives all of them the same budget; "repaired" mode reads
every question token at the retrieval heads, against what a content-free question draws, and adds the
retriever's own evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctxcompress.backbone import Backbone
from ctxcompress.calibration import BUDGET_TEMPERATURE, Calibration
from ctxcompress.config import DASTConfig
from ctxcompress.scores import attention_evidence, attention_mass, importance, shares, standardised

PREFIX = "Documents:\n\n"
SEPARATOR = "\n\n"
QUESTION = "Question: {query}\nAnswer:"
CONTENT_FREE = "N/A"


@dataclass(frozen=True, slots=True)
class Worth:
    """What the documents of one query are worth.

    Attributes:
        shares_N: (N,) float64; sums to 1.
        prior: "retriever" if the retriever's scores took part, else "none".
    """

    shares_N: Tensor
    prior: str = "none"


class DAST:
    """Scores documents against a query with one language model.

    Args:
        backbone: reads the documents and the question.
        config: the method's settings.
        calibration: retrieval heads and weights for "repaired" mode; None takes the shipped ones or the
            middle third.
    """

    def __init__(
        self, backbone: Backbone, config: DASTConfig | None = None, calibration: Calibration | None = None
    ) -> None:
        self._backbone = backbone
        self._config = config or DASTConfig()
        self.calibration = calibration or Calibration.for_model(backbone.name, *backbone.layers_heads)
        self.calibration.check(*backbone.layers_heads)

    def worth(
        self, documents: Sequence[Sequence[int]], query: str, retrieved: Sequence[float | None]
    ) -> Worth:
        """Shares of the documents.

        Args:
            documents: token ids of each; at least one token in all.
            query: the question, not empty.
            retrieved: the retriever's score of each document; used as prior when every document has one.
        """
        if self._config.mode == "repaired":
            return self._repaired(documents, query, retrieved)
        reading = self._backbone.read_queries(
            self._separated(documents),
            [self._question(query)],
            prefix=self._ids(PREFIX),
            last_token=True,
            with_nll=True,
        )
        if reading.nll_N is None:
            raise RuntimeError("the pass was asked for the NLL and returned none")
        scores_N = importance(
            attention_mass(reading.mass_QLHN[0]),
            reading.nll_N,
            alpha=self._config.alpha,
            ppl_sign=self._config.ppl_sign,
        )
        default = 1.0 if self._config.mode == "paper" else 1 / len(documents)
        return Worth(shares(scores_N, self._config.temperature or default))

    def _repaired(
        self, documents: Sequence[Sequence[int]], query: str, retrieved: Sequence[float | None]
    ) -> Worth:
        question_LHN, baseline_LHN = self.masses(
            documents, query, layers=1 + max(layer for layer, _ in self.calibration.heads)
        )
        evidence_N = attention_evidence(question_LHN, baseline_LHN, self.calibration.heads)
        scores = [score for score in retrieved if score is not None]
        use_prior = self._config.prior == "retriever" and len(scores) == len(documents)
        if use_prior:
            prior_N = standardised(torch.tensor(scores, dtype=torch.float64))
            scores_N = self.calibration.attention * evidence_N + self.calibration.prior * prior_N
        else:
            scores_N = self.calibration.attention_alone * evidence_N
        return Worth(
            shares(scores_N, self._config.temperature or BUDGET_TEMPERATURE),
            "retriever" if use_prior else "none",
        )

    def masses(
        self, documents: Sequence[Sequence[int]], query: str, *, layers: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention mass (L, H, N) on each document: of the question's tokens, of a content-free one's."""
        reading = self._backbone.read_queries(
            self._separated(documents),
            [self._question(query), self._question(CONTENT_FREE)],
            prefix=self._ids(PREFIX),
            layers=layers,
        )
        return reading.mass_QLHN[0], reading.mass_QLHN[1]

    def _separated(self, documents: Sequence[Sequence[int]]) -> list[list[int]]:
        separator = self._ids(SEPARATOR)
        return [[*ids, *separator] if ids else [] for ids in documents]

    def _question(self, query: str) -> tuple[int, ...]:
        return self._ids(QUESTION.format(query=query))

    def _ids(self, text: str) -> tuple[int, ...]:
        return self._backbone.encode(text).ids
