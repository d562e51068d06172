"""What a model's attention is worth as evidence: its retrieval heads, and weights fitted on questions.

A few heads in the middle layers do the retrieving. `calibrate` finds them once per model on questions whose
gold document is known, fits how sharply evidence should turn into budget, and the result is a small JSON
file.

Shapes: L layers, H heads, N documents of one question.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctxcompress.embedded import EMBEDDED
from ctxcompress.errors import InputError, ModelError
from ctxcompress.files import write_atomically
from ctxcompress.scores import attention_evidence, standardised

FORMAT = 1
HEAD_COUNTS = (1, 2, 4, 6, 8, 12, 16)
FOLDS = 5
RIDGE = 1e-3
SHARPNESSES = (2.5, 5.0, 10.0)
BUDGET_TEMPERATURE = 0.25
"""Sharpening of fitted odds into shares of a budget.

The fit asks how likely a document is to be gold; a budget asks how much of the gold one is kept, and half a
gold document is worth less than half. On the calibration questions at ratio 4 this keeps 85 % of the gold
document by attention alone, where temperature 1 keeps 81 %.
"""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Heads and weights of one model.

    Attributes:
        heads: (layer, head) pairs whose attention is read.
        attention_alone: weight of the attention evidence when nothing else is known.
        attention: its weight beside the retriever's prior.
        prior: weight of the retriever's standardised scores.
        bm25: weight of standardised BM25 scores in the `bm25` allocator.
        embedding: weight of standardised cosine similarities in the `embedding` allocator.
        provenance: model, data, questions and figures of the fit.
    """

    heads: tuple[tuple[int, int], ...]
    attention_alone: float
    attention: float
    prior: float
    bm25: float = 1.0
    embedding: float = 1.0
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that changes results, JSON-ready; where the numbers come from does not."""
        settings = dataclasses.asdict(self)
        del settings["provenance"]
        return {**settings, "heads": [list(head) for head in self.heads]}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the calibration as JSON; a file already there is replaced in one step."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        write_atomically(Path(path), (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a calibration.

        Raises:
            ModelError: the file is missing, not a calibration, or of another format.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            version = content.pop("format")
            if version != FORMAT:
                raise ValueError(f"format {version}")
            heads = tuple((int(layer), int(head)) for layer, head in content.pop("heads"))
            return cls(heads=heads, **content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"a calibration file of format {FORMAT} was expected at {path}, got: {error}; make one "
                "with: ctxcompress calibrate --task FILE --output PATH"
            ) from error

    def check(self, layers: int, heads: int) -> None:
        """Refuse a model that does not have these heads.

        Raises:
            ModelError: the calibration was made for another model.
        """
        if not self.heads or any(layer >= layers or head >= heads for layer, head in self.heads):
            raise ModelError(
                f"the calibration must name heads of a model with {layers} layers of {heads} heads, got "
                f"{list(self.heads)[:8]}; it was made for another model: run ctxcompress calibrate for this "
                "one"
            )

    @classmethod
    def for_model(cls, name: str, layers: int, heads: int) -> Calibration:
        """The shipped calibration of "embedded"; for others all heads of the middle third of the layers.

        The weights of these are what the middle third of the embedded model is worth on Natural Questions.
        """
        if name == EMBEDDED:
            return cls.load(str(files("ctxcompress") / "calibrations" / "embedded.json"))
        middle = range(layers // 3, max(layers - layers // 3, layers // 3 + 1))
        every_head = tuple((layer, head) for layer in middle for head in range(heads))
        return cls(heads=every_head, attention_alone=13.0, attention=1.0, prior=3.4)


@dataclass(frozen=True, slots=True)
class Observation:
    """One labelled question: every signal of every unit (document or chunk), and which units are gold.

    Attributes:
        question_LHN: attention mass under the question.
        baseline_LHN: attention mass under the content-free question.
        prior_N: similarity of the unit's document, as a retriever would have it.
        embedding_N: similarity of the unit itself.
        bm25_N: BM25 score.
        gold_N: bool; at least one is true.
    """

    question_LHN: Tensor
    baseline_LHN: Tensor
    prior_N: Tensor
    embedding_N: Tensor
    bm25_N: Tensor
    gold_N: Tensor


def calibrate(observations: Sequence[Observation], provenance: dict[str, Any]) -> Calibration:
    """Choose heads that alone predict the gold document, their number by cross-validation; fit weights.

    Args:
        observations: labelled questions, at least 2 * FOLDS of them.
        provenance: where they come from; kept in the result beside the figures of the fit.

    Raises:
        InputError: too few questions with a gold document.
    """
    if len(observations) < 2 * FOLDS:
        raise InputError(
            f"calibration needs at least {2 * FOLDS} questions with a gold document among several, got "
            f"{len(observations)}; raise --limit or use another task file"
        )
    losses = {count: _held_out_loss(observations, count) for count in HEAD_COUNTS}
    count = min(losses, key=lambda count: losses[count])
    heads = _best_heads(observations, count)
    evidence = [attention_evidence(seen.question_LHN, seen.baseline_LHN, heads) for seen in observations]
    prior = [standardised(seen.prior_N) for seen in observations]
    embedding = [standardised(seen.embedding_N) for seen in observations]
    bm25 = [standardised(seen.bm25_N) for seen in observations]
    gold = [seen.gold_N for seen in observations]
    (alone,), (attention, weight) = _fit([evidence], gold), _fit([evidence, prior], gold)
    both = [attention * e + weight * p for e, p in zip(evidence, prior, strict=True)]
    figures = {
        "questions": len(observations),
        "held_out_loss_by_heads": {str(count): round(loss, 4) for count, loss in losses.items()},
        "gold_first": {
            "attention": _gold_first(evidence, gold),
            "prior": _gold_first(prior, gold),
            "attention+prior": _gold_first(both, gold),
            "embedding": _gold_first(embedding, gold),
            "bm25": _gold_first(bm25, gold),
        },
    }
    return Calibration(
        heads=heads,
        attention_alone=alone,
        attention=attention,
        prior=weight,
        bm25=_fit([bm25], gold)[0],
        embedding=_fit([embedding], gold)[0],
        provenance={**provenance, **figures},
    )


def _best_heads(observations: Sequence[Observation], count: int) -> tuple[tuple[int, int], ...]:
    """The heads whose own evidence gives gold documents the lowest loss at their best sharpness."""
    loss_3LH = torch.stack([_head_losses(seen) for seen in observations]).mean(dim=0)
    loss_LH = loss_3LH.min(dim=0).values
    best = loss_LH.flatten().argsort(stable=True)[:count].tolist()
    width = loss_LH.shape[1]
    return tuple(sorted((index // width, index % width) for index in best))


def _head_losses(seen: Observation) -> Tensor:
    """Loss of every head alone at three sharpnesses, (3, L, H)."""
    question_LHN, baseline_LHN = (
        mass_LHN / mass_LHN.sum(dim=-1, keepdim=True).clamp(min=1e-9)
        for mass_LHN in (seen.question_LHN, seen.baseline_LHN)
    )
    evidence_LHN = question_LHN - baseline_LHN
    log_3LHN = torch.stack([(weight * evidence_LHN).log_softmax(dim=-1) for weight in SHARPNESSES])
    return -log_3LHN[..., seen.gold_N].mean(dim=-1)


def _held_out_loss(observations: Sequence[Observation], count: int) -> float:
    """Mean loss on questions that took no part in choosing `count` heads and fitting their weight."""
    losses = []
    for fold in range(FOLDS):
        chosen = [seen for place, seen in enumerate(observations) if place % FOLDS != fold]
        held_out = [seen for place, seen in enumerate(observations) if place % FOLDS == fold]
        heads = _best_heads(chosen, count)
        (weight,) = _fit([_evidence(chosen, heads)], [seen.gold_N for seen in chosen])
        for evidence, seen in zip(_evidence(held_out, heads), held_out, strict=True):
            losses.append(float(_loss(weight * evidence.double(), seen.gold_N)))
    return sum(losses) / len(losses)


def _evidence(observations: Sequence[Observation], heads: Sequence[tuple[int, int]]) -> list[Tensor]:
    return [attention_evidence(seen.question_LHN, seen.baseline_LHN, heads) for seen in observations]


def _loss(scores_N: Tensor, gold_N: Tensor) -> Tensor:
    return -scores_N.log_softmax(dim=0)[gold_N].mean()


def _fit(features: Sequence[Sequence[Tensor]], gold: Sequence[Tensor]) -> tuple[float, ...]:
    """Weights of a softmax regression over the documents of each question, >= 0, with a slight ridge."""
    weights = torch.zeros(len(features), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        stacked = (torch.stack(values, dim=-1).double() @ weights for values in zip(*features, strict=True))
        value = torch.stack(
            [_loss(scores, gold_N) for scores, gold_N in zip(stacked, gold, strict=True)]
        ).mean()
        value = value + RIDGE * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return tuple(round(max(weight, 0.0), 4) for weight in weights.tolist())


def _gold_first(scores: Sequence[Tensor], gold: Sequence[Tensor]) -> float:
    hits = [bool(gold_N[int(scores_N.argmax())]) for scores_N, gold_N in zip(scores, gold, strict=True)]
    return round(sum(hits) / len(hits), 4)
