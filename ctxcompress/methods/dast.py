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

from ctxcompress.backbone import Backbone, Ids, splice
from ctxcompress.calibration import BUDGET_TEMPERATURE, Calibration
from ctxcompress.config import DASTConfig
from ctxcompress.pooling import windows
from ctxcompress.prompt import BETWEEN, around_documents
from ctxcompress.scores import attention_evidence, attention_mass, importance, shares, standardised

PREFIX = "Documents:\n\n"
QUESTION = "Question: {query}\nAnswer:"
CONTENT_FREE = "N/A"


@dataclass(frozen=True, slots=True)
class Worth:
    """What the documents of one query are worth.

    Attributes:
        shares_N: (N,) float64; sums to 1.
        prior: "retriever" if the retriever's scores took part, else "none".
        log2_ratios_N: (N,) float64; ratios asked for, before the dial, by an allocator that asks for ratios;
            None lets Algorithm 1 turn shares into sizes.
    """

    shares_N: Tensor
    prior: str = "none"
    log2_ratios_N: Tensor | None = None


class DAST:
    """Scores documents against a query with one language model.

    Args:
        backbone: reads the documents and the question.
        config: the method's settings.
        calibration: retrieval heads and weights for "repaired" mode; None takes the shipped ones or the
            middle third.
        as_asked: read documents and question in the very prompt that answers come from, as an adapter's
            decoder was trained to; else in a plain one without chat template.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: DASTConfig | None = None,
        calibration: Calibration | None = None,
        *,
        as_asked: bool = False,
    ) -> None:
        self._backbone = backbone
        self._config = config or DASTConfig()
        self._as_asked = as_asked
        self.calibration = calibration or Calibration.for_model(backbone.name, *backbone.layers_heads)
        self.calibration.check(*backbone.layers_heads)

    @property
    def needs_nll(self) -> bool:
        """Whether the mode weighs documents by their NLL."""
        return self._config.mode != "repaired"

    def scoring_ratio(self, tokens: Sequence[int], ratio_set: Sequence[int]) -> int:
        """The finest ratio at which documents of these lengths fill at most `window_share` of the window.

        The coarsest ratio if none is coarse enough: the pass then takes several windows if it must.
        """
        room = self._config.window_share * self._backbone.window
        for ratio in sorted(ratio_set):
            if sum(windows(count, ratio) for count in tokens) <= room:
                return ratio
        return max(ratio_set)

    def worth(
        self,
        documents: Sequence[Ids | Tensor],
        query: str,
        retrieved: Sequence[float | None],
        nll_N: Tensor | None = None,
        ends: Sequence[bool] | None = None,
    ) -> Worth:
        """Shares of the documents, or of their chunks.

        Args:
            documents: token ids or (M, D) soft tokens of each; at least one token in all.
            query: the question, not empty.
            retrieved: the retriever's score of each document; used as prior when every document has one and
                they are not all equal, as for chunks of a single document.
            nll_N: mean NLL of each document, nats; None reads it off the pass, which needs token ids.
            ends: of each chunk, whether a document ends with it: then a blank line follows, as in prompts;
                None means that all are documents.
        """
        if self._config.mode == "repaired":
            return self._repaired(documents, query, retrieved, ends)
        reading = self._backbone.read_queries(
            self._separated(documents, ends),
            [self._around(query)[1]],
            prefix=self._around(query)[0],
            last_token=True,
            with_nll=nll_N is None,
        )
        nll_N = reading.nll_N if nll_N is None else nll_N
        if nll_N is None:
            raise RuntimeError("the pass was asked for the NLL and returned none")
        scores_N = importance(
            attention_mass(reading.mass_QLHN[0]),
            nll_N,
            alpha=self._config.alpha,
            ppl_sign=self._config.ppl_sign,
        )
        default = 1.0 if self._config.mode == "paper" else 1 / len(documents)
        return Worth(shares(scores_N, self._config.temperature or default))

    def _repaired(
        self,
        documents: Sequence[Ids | Tensor],
        query: str,
        retrieved: Sequence[float | None],
        ends: Sequence[bool] | None,
    ) -> Worth:
        question_LHN, baseline_LHN = self.masses(
            documents, query, ends, layers=1 + max(layer for layer, _ in self.calibration.heads)
        )
        evidence_N = attention_evidence(question_LHN, baseline_LHN, self.calibration.heads)
        scores = [score for score in retrieved if score is not None]
        telling = len(scores) == len(documents) and len(set(scores)) > 1
        use_prior = self._config.prior == "retriever" and telling
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
        self,
        documents: Sequence[Ids | Tensor],
        query: str,
        ends: Sequence[bool] | None = None,
        *,
        layers: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention mass (L, H, N) on each document: of the question's tokens, of a content-free one's."""
        reading = self._backbone.read_queries(
            self._separated(documents, ends),
            [self._around(query)[1], self._around(CONTENT_FREE)[1]],
            prefix=self._around(query)[0],
            layers=layers,
        )
        return reading.mass_QLHN[0], reading.mass_QLHN[1]

    def _separated(
        self, documents: Sequence[Ids | Tensor], ends: Sequence[bool] | None
    ) -> list[Ids | Tensor]:
        separator = self._ids(BETWEEN)
        embed = self._backbone.model.get_input_embeddings()
        separated: list[Ids | Tensor] = []
        for document, end in zip(documents, ends or [True] * len(documents), strict=True):
            if not (end and len(document)):
                separated.append(document)
            elif isinstance(document, Tensor):
                separated.append(splice([document, separator], embed))
            else:
                separated.append((*document, *separator))
        return separated

    def _around(self, query: str) -> tuple[Ids, Ids]:
        """Token ids before the documents, and after them."""
        if self._as_asked:
            return around_documents(self._backbone, query)
        return self._ids(PREFIX), self._ids(QUESTION.format(query=query))

    def _ids(self, text: str) -> Ids:
        return self._backbone.encode(text).ids
