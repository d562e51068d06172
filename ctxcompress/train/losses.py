"""Batch -> losses: what the decoder says after reading soft tokens, against what it should say.

Shapes: B batch, T tokens, N target tokens of the batch, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctxcompress.pooling import windows
from ctxcompress.prompt import Ids, length, splice
from ctxcompress.soft import SoftCompressor
from ctxcompress.train.data import Batch, Sample, Slot

DISTILLED = ("answer", "continuation")


class Objective(nn.Module):
    """Losses of a compressor; one module, so that accelerate can wrap what is trained.

    Args:
        compressor: encoder, converter and decoder.
        distillation: weight of the distillation loss.
    """

    def __init__(self, compressor: SoftCompressor, distillation: float) -> None:
        super().__init__()
        self.compressor = compressor
        self._distillation = distillation

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Losses in nats per target token: "loss", which is trained, and what it is made of."""
        documents = [document for sample in batch.samples for document in sample.documents]
        logits_NV = self._logits(batch.samples, self._soft(documents, batch.ratio))
        targets_N = torch.tensor([token for sample in batch.samples for token in sample.targets])
        nll = F.cross_entropy(logits_NV.float(), targets_N.to(logits_NV.device))
        losses = {"loss": nll, "nll": nll.detach()}
        if self._distillation and batch.ratio > 1 and batch.objective in DISTILLED:
            with torch.no_grad():
                teacher_NV = self._logits(batch.samples, self._soft(documents, 1))
            divergence = F.kl_div(
                logits_NV.float().log_softmax(-1),
                teacher_NV.float().log_softmax(-1),
                log_target=True,
                reduction="batchmean",
            )
            losses |= {"loss": nll + self._distillation * divergence, "kl": divergence.detach()}
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

    def _logits(self, samples: Sequence[Sample], soft: Sequence[Tensor]) -> Tensor:
        """(N, V) logits of every target token, samples one after another."""
        model = self.compressor.decoder_model
        embed = model.get_input_embeddings()
        rows: list[Tensor] = []
        taken: list[tuple[int, slice]] = []
        first = 0
        for sample in samples:
            filled: list[Ids | Tensor] = []
            for prompt, target in sample.turns:
                filled += [soft[first + part.document] if isinstance(part, Slot) else part for part in prompt]
                start = length(filled) - 1
                taken.append((len(rows), slice(start, start + len(target))))
                filled.append(target)
            rows.append(splice(filled, embed))
            first += len(sample.documents)
        # Padding is on the right and attention causal: no real token ever sees it, so no mask is needed.
        padded_BTD = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        hidden_BTD = model.model(inputs_embeds=padded_BTD, use_cache=False).last_hidden_state
        hidden_ND = torch.cat([hidden_BTD[row, places] for row, places in taken])
        logits_NV: Tensor = model.lm_head(hidden_ND)
        return logits_NV
