"""Batch -> losses: what the decoder says after reading soft tokens, against what it should say.

Shapes: B batch, T tokens, N target tokens of the batch, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctxcompress.attention import TrainedMass
from ctxcompress.backbone import Ids, splice
from ctxcompress.pooling import windows
from ctxcompress.prompt import length
from ctxcompress.soft import SoftCompressor
from ctxcompress.train.data import Batch, Sample, Slot
from ctxcompress.types import Span

DISTILLED = ("answer", "continuation")


class Objective(nn.Module):
    """Losses of a compressor; one module, so that accelerate can wrap what is trained.

    Args:
        compressor: encoder, converter and decoder.
        distillation: weight of the distillation loss.
        attention: weight of the attention loss, which trains DAST's signal with the decoder: cross-entropy
            over documents of the attention `heads` pay to them from the question, the gold ones as label.
        heads: (layer, head) pairs that shall retrieve.
    """

    def __init__(
        self,
        compressor: SoftCompressor,
        distillation: float,
        attention: float = 0.0,
        heads: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__()
        self.compressor = compressor
        self._distillation = distillation
        self._attention = attention
        self._heads = heads

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Losses in nats per target token: "loss", which is trained, and what it is made of."""
        documents = [document for sample in batch.samples for document in sample.documents]
        spliced = self._spliced(batch.samples, self._soft(documents, batch.ratio))
        recorder = None
        if self._attention and any(sample.gold for sample in batch.samples):
            recorder = TrainedMass(self._heads, spliced.readings)
        logits_NV = self._logits(spliced, recorder)
        targets_N = torch.tensor([token for sample in batch.samples for token in sample.targets])
        nll = F.cross_entropy(logits_NV.float(), targets_N.to(logits_NV.device))
        losses = {"loss": nll, "nll": nll.detach()}
        if self._distillation and batch.ratio > 1 and batch.objective in DISTILLED:
            with torch.no_grad():
                teacher_NV = self._logits(self._spliced(batch.samples, self._soft(documents, 1)))
            divergence = F.kl_div(
                logits_NV.float().log_softmax(-1),
                teacher_NV.float().log_softmax(-1),
                log_target=True,
                reduction="batchmean",
            )
            losses |= {"loss": losses["loss"] + self._distillation * divergence, "kl": divergence.detach()}
        if recorder is not None:
            missed = _missed(recorder.mass_BN, batch.samples)
            losses |= {"loss": losses["loss"] + self._attention * missed, "attention": missed.detach()}
        return losses

    def _soft(self, documents: Sequence[Sequence[int]], ratio: int) -> list[Tensor]:
        """Embeddings of every document at `ratio`; at 1 those of its tokens."""
        if ratio == 1:
            embed = self.compressor.encoder.embed_tokens
            device = self.compressor.device
            return [embed(torch.tensor(document, dtype=torch.long, device=device)) for document in documents]
        features, _ = self.compressor.read(documents, ratio)
        soft_BMD = self.compressor.converter(features)
        end = self.compressor.config.pool_end_token
        return [
            row[: windows(len(document) + end, ratio)]
            for row, document in zip(soft_BMD, documents, strict=True)
        ]

    def _spliced(self, samples: Sequence[Sample], soft: Sequence[Tensor]) -> _Spliced:
        embed = self.compressor.decoder_model.get_input_embeddings()
        spliced = _Spliced([], [], [])
        first = 0
        for sample in samples:
            filled: list[Ids | Tensor] = []
            for prompt, target in sample.turns:
                if not filled:
                    spliced.readings.append(_reading(prompt, soft[first:]))
                filled += [soft[first + part.document] if isinstance(part, Slot) else part for part in prompt]
                start = length(filled) - 1
                spliced.taken.append((len(spliced.rows), slice(start, start + len(target))))
                filled.append(target)
            spliced.rows.append(splice(filled, embed))
            first += len(sample.documents)
        return spliced

    def _logits(self, spliced: _Spliced, recorder: TrainedMass | None = None) -> Tensor:
        """(N, V) logits of every target token, samples one after another."""
        model = self.compressor.decoder_model
        # Padding is on the right and attention causal: no real token ever sees it, so no mask is needed.
        padded_BTD = nn.utils.rnn.pad_sequence(spliced.rows, batch_first=True)
        hidden_BTD = model.model(
            inputs_embeds=padded_BTD, use_cache=False, recorder=recorder
        ).last_hidden_state
        hidden_ND = torch.cat([hidden_BTD[row, places] for row, places in spliced.taken])
        logits_NV: Tensor = model.lm_head(hidden_ND)
        return logits_NV


class _Spliced(NamedTuple):
    """Input embeddings of samples, and what stands where in them.

    Attributes:
        rows: (T, D) of each sample.
        taken: row and positions whose next token is a target.
        readings: of each row the ranges of its documents, and the range of what follows them in the first
            prompt, which is the question.
    """

    rows: list[Tensor]
    taken: list[tuple[int, slice]]
    readings: list[tuple[list[Span], Span]]


def _reading(prompt: Sequence[Ids | Slot], soft: Sequence[Tensor]) -> tuple[list[Span], Span]:
    documents: dict[int, Span] = {}
    position = 0
    question = 0
    for part in prompt:
        start, position = position, position + len(soft[part.document] if isinstance(part, Slot) else part)
        if isinstance(part, Slot):
            documents[part.document] = (start, position)
            question = position
    return [documents[place] for place in sorted(documents)], (question, position)


def _missed(mass_BN: Sequence[Tensor], samples: Sequence[Sample]) -> Tensor:
    """Mean of -log of the gold documents' part of the attention that all documents draw."""
    parts = [
        mass_N[list(sample.gold)].sum() / mass_N.sum()
        for mass_N, sample in zip(mass_BN, samples, strict=True)
        if sample.gold
    ]
    return -torch.stack(parts).log().mean()
