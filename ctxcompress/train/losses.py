"""Batch -> losses: what the decoder says after reading soft tokens, against what it should say.

Shapes: B batch, T tokens, M soft tokens of the batch, N its target tokens (of attention mass: documents),
D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctxcompress.attention import TrainedMass
from ctxcompress.soft import SoftCompressor
from ctxcompress.train.data import Batch, Chunk, Sample, Slot, whole
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
        # Where accelerate looks for the layers that FSDP shards one by one.
        self._no_split_modules = list(compressor.decoder_model._no_split_modules)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Losses in nats per target token: "loss", which is trained, and what it is made of."""
        spliced = self._spliced(batch.samples, *self._soft(batch.chunks))
        recorder = None
        if self._attention and any(sample.gold for sample in batch.samples):
            recorder = TrainedMass(self._heads, spliced.readings)
        logits_NV = self._logits(spliced, recorder)
        targets_N = torch.tensor([token for sample in batch.samples for token in sample.targets])
        nll = F.cross_entropy(logits_NV.float(), targets_N.to(logits_NV.device))
        losses = {"loss": nll, "nll": nll.detach()}
        if self._distillation and batch.ratio != 1 and batch.objective in DISTILLED:
            with torch.no_grad():
                raw = self._soft(whole(batch.samples, 1))
                teacher_NV = self._logits(self._spliced(batch.samples, *raw))
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

    def _soft(self, documents: Sequence[Sequence[Chunk]]) -> tuple[Tensor, list[int]]:
        """(M, D) embeddings of all documents, one after another, and how many each has."""
        size = self.compressor.size
        chunks = [chunk for document in documents for chunk in document]
        parts: list[Tensor] = []
        starts: dict[int, int] = {}  # of each chunk, in both parts together
        end = 0
        for make, raw in ((self._embedded, True), (self._softened, False)):
            places = [place for place, (_, ratio) in enumerate(chunks) if (ratio == 1) == raw]
            if not places:
                continue
            rows_BMD = make([chunks[place] for place in places])
            for row, place in enumerate(places):
                starts[place] = end + row * rows_BMD.shape[1]
            parts.append(rows_BMD.flatten(0, 1))
            end += len(parts[-1])
        kept_M = torch.cat(
            [starts[place] + torch.arange(size(len(ids), ratio)) for place, (ids, ratio) in enumerate(chunks)]
        )
        sizes = [sum(size(len(ids), ratio) for ids, ratio in document) for document in documents]
        return torch.cat(parts).index_select(0, kept_M.to(parts[0].device)), sizes

    def _softened(self, chunks: Sequence[Chunk]) -> Tensor:
        """(B, M, D) soft tokens of chunks, padded on the right."""
        features, _ = self.compressor.read([ids for ids, _ in chunks], [ratio for _, ratio in chunks])
        soft_BMD: Tensor = self.compressor.converter(features)
        return soft_BMD

    def _embedded(self, chunks: Sequence[Chunk]) -> Tensor:
        """(B, M, D) input embeddings of raw chunks, padded on the right."""
        tokens = [torch.tensor(ids, dtype=torch.long) for ids, _ in chunks]
        ids_BM = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        embeds_BMD: Tensor = self.compressor.encoder.embed_tokens(ids_BM.to(self.compressor.device))
        return embeds_BMD

    def _spliced(self, samples: Sequence[Sample], soft_MD: Tensor, sizes: Sequence[int]) -> _Spliced:
        """Samples as padded rows; all places are found before any is filled, for which few kernels do."""
        ends = [0, *accumulate(sizes)]
        spans = pairwise(ends)
        rows = [_row(sample, [next(spans) for _ in sample.documents]) for sample in samples]
        # Padding is on the right and attention causal: no real token ever sees it, so no mask is needed.
        codes_BT = nn.utils.rnn.pad_sequence([torch.tensor(row.codes) for row in rows], batch_first=True)
        codes_T, width = codes_BT.flatten(), codes_BT.shape[1]
        places_M = (codes_T < 0).nonzero().squeeze(1)
        taken_N = torch.cat([number * width + torch.tensor(row.taken) for number, row in enumerate(rows)])
        embed = self.compressor.decoder_model.get_input_embeddings()
        device = embed.weight.device
        embeds_TD = embed(codes_T.clamp(min=0).to(device))
        filled_MD = soft_MD.index_select(0, (~codes_T[places_M]).to(device)).to(embeds_TD.dtype)
        embeds_TD = embeds_TD.index_copy(0, places_M.to(device), filled_MD)
        readings = [(row.documents, row.question) for row in rows]
        return _Spliced(embeds_TD.unflatten(0, codes_BT.shape), taken_N.to(device), readings)

    def _logits(self, spliced: _Spliced, recorder: TrainedMass | None = None) -> Tensor:
        """(N, V) logits of every target token, samples one after another."""
        model = self.compressor.decoder_model
        hidden_BTD = model.model(
            inputs_embeds=spliced.embeds_BTD, use_cache=False, recorder=recorder
        ).last_hidden_state
        logits_NV: Tensor = model.lm_head(hidden_BTD.flatten(0, 1).index_select(0, spliced.taken_N))
        return logits_NV


class _Spliced(NamedTuple):
    """Input embeddings of samples, and what stands where in them.

    Attributes:
        embeds_BTD: one sample a row, padded on the right.
        taken_N: places, rows one after another, whose next token is a target.
        readings: of each row the ranges of its documents, and the range of what follows them in the first
            prompt, which is the question.
    """

    embeds_BTD: Tensor
    taken_N: Tensor
    readings: list[tuple[list[Span], Span]]


class _Row(NamedTuple):
    """What a sample's row holds, before anything is looked up.

    Attributes:
        codes: token ids, and for a soft token the complement of its place in the batch, which is negative.
        taken: places whose next token is a target.
        documents: range of each.
        question: range of what follows them in the first prompt.
    """

    codes: list[int]
    taken: list[int]
    documents: list[Span]
    question: Span


def _row(sample: Sample, soft: Sequence[Span]) -> _Row:
    """A sample whose documents have the soft tokens `soft` of the batch."""
    codes: list[int] = []
    taken: list[int] = []
    documents: dict[int, Span] = {}
    asked = 0
    for prompt, target in sample.turns:
        for part in prompt:
            if isinstance(part, Slot):
                start = len(codes)
                codes += (~place for place in range(*soft[part.document]))
                documents[part.document] = (start, len(codes))
            else:
                codes += part
        asked = asked or len(codes)
        taken += range(len(codes) - 1, len(codes) - 1 + len(target))
        codes += target
    read = max((stop for _, stop in documents.values()), default=0)
    return _Row(codes, taken, [documents[number] for number in sorted(documents)], (read, asked))


def _missed(mass_BN: Tensor, samples: Sequence[Sample]) -> Tensor:
    """Mean of -log of the gold documents' part of the attention that all documents draw."""
    gold_BN = torch.zeros(mass_BN.shape)
    for row, sample in enumerate(samples):
        gold_BN[row, list(sample.gold)] = 1.0
    known_B = torch.tensor([row for row, sample in enumerate(samples) if sample.gold]).to(mass_BN.device)
    mass_BN, gold_BN = (each[known_B] for each in (mass_BN, gold_BN.to(mass_BN.device)))
    return -((mass_BN * gold_BN).sum(dim=1) / mass_BN.sum(dim=1)).log().mean()
