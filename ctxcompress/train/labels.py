"""Labels of the ratio head from the compressor itself, and the head in closed form.

`compressibility` asks the trained compressor: up to which ratio does it still say a text almost as well as at
the finest one? No teacher is needed, and the label means what the head is used for. `fit_ratio_head` then
solves for the head: it is linear and the encoder stands still, so there is nothing to iterate.

Shapes: N texts, D hidden, P penalties, R ratios, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ctxcompress.backbone import Ids
from ctxcompress.config import one_of
from ctxcompress.errors import ConfigError, InputError
from ctxcompress.methods.dac import Progress
from ctxcompress.prompt import CONTINUE, REPEAT, chat_prompt
from ctxcompress.soft import SoftCompressor
from ctxcompress.train.data import Sample, Slot, whole
from ctxcompress.train.losses import Objective

Judge = Literal["reconstruction", "continuation"]
PENALTIES = tuple(10.0**exponent for exponent in range(-5, 5))
"""Of the ridge, relative to the number of texts; the last one leaves little but the mean."""


def cut(texts: Sequence[Sequence[int]], tokens: int, judge: Judge = "reconstruction") -> list[Ids]:
    """What `compressibility` compresses of each text, so what its labels belong to.

    Args:
        texts: token ids of each.
        tokens: most tokens to compress.
        judge: "continuation" compresses the first half, the second is what has to be said.

    Raises:
        InputError: a text without tokens to compress or to say.
    """
    sizes = [min(tokens, len(text) // (2 if judge == "continuation" else 1)) for text in texts]
    if 0 in sizes:
        short = sizes.index(0)
        raise InputError(
            f"{judge} needs texts with tokens to compress and to say, got {len(texts[short])} tokens in text "
            f"number {short + 1}; leave it out"
        )
    return [tuple(text[:size]) for text, size in zip(texts, sizes, strict=True)]


def compressibility(
    compressor: SoftCompressor,
    texts: Sequence[Sequence[int]],
    *,
    tolerance: float = 0.5,
    tokens: int = 48,
    batch_size: int = 32,
    judge: Judge = "reconstruction",
    progress: Progress | None = None,
) -> list[float]:
    """The log2 ratio at which each text's loss has risen by `tolerance` above that at the finest ratio.

    Args:
        compressor: trained on `judge`.
        texts: token ids of each; `cut` says what of them is compressed.
        tolerance: nats per target token, >= 0; larger ones shift all labels up.
        tokens: most tokens to compress; no more than it was trained on, or all labels sink.
        batch_size: texts of a forward pass.
        judge: what the decoder has to say after the soft tokens.
        progress: told after every batch.

    Returns:
        One label per text, in order: from the log2 of the set's smallest ratio to that of its largest, linear
        in between.

    Raises:
        ConfigError: a setting out of its range.
        InputError: a text too short to be judged.
    """
    if not 0 <= tolerance < math.inf or batch_size < 1 or not 1 <= tokens <= compressor.window:
        raise ConfigError(
            f"tolerance must be finite and >= 0, batch_size >= 1 and tokens 1 to {compressor.window}, got "
            f"{tolerance}, {batch_size} and {tokens}"
        )
    documents = cut(texts, tokens, one_of("judge", judge, Judge))
    samples = [
        _sample(compressor, document, tuple(text[len(document) : 2 * len(document)]), judge)
        for document, text in zip(documents, texts, strict=True)
    ]
    objective = Objective(compressor, 0.0)
    ratios = compressor.config.ratio_set
    logs = [math.log2(ratio) for ratio in ratios]
    labels = [0.0] * len(samples)
    done = 0
    for places in _batches([len(document) for document in documents], batch_size):
        batch = [samples[place] for place in places]
        losses_R = [_losses(objective, batch, ratio) for ratio in ratios]
        for place, *losses in zip(places, *losses_R, strict=True):
            labels[place] = within(logs, losses, tolerance)
        done += len(places)
        if progress is not None:
            progress("judging texts", done, len(samples))
    return labels


def within(logs: Sequence[float], losses: Sequence[float], tolerance: float) -> float:
    """Where the line through (logs, losses) first rises more than `tolerance` above its start, or its end.

    The first rise counts: a loss that is better again at a coarser ratio is chance.

    Args:
        logs: ascending log2 ratios.
        losses: nats per token at each.
        tolerance: nats per token, >= 0.

    Example:
        >>> within([1.0, 2.0, 3.0], [0.5, 0.75, 1.75], 0.5)  # 2 + (1 - 0.75) / (1.75 - 0.75)
        2.25
    """
    limit = losses[0] + tolerance
    for (log, loss), (next_log, next_loss) in itertools.pairwise(zip(logs, losses, strict=True)):
        if next_loss > limit:
            return log + (next_log - log) * (limit - loss) / (next_loss - loss)
    return logs[-1]


def fit_ratio_head(
    compressor: SoftCompressor,
    texts: Sequence[Sequence[int]],
    log2_ratios: Sequence[float],
    *,
    folds: int = 5,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, float]:
    """Set the ratio head to the ridge regression of labels on end-token states, and say how well it predicts.

    The penalty is the one with the smallest error on held-out folds. The figures come from folds that neither
    the weights nor the penalty have seen. Copies of a text stay in one fold.

    Args:
        compressor: its head and fingerprint are changed, nothing else.
        texts: token ids of each, as they were labelled; beyond the window, the mean over pieces is fitted,
            which is what `encode` predicts.
        log2_ratios: label of each.
        folds: parts of the data, >= 2.
        batch_size: texts of a forward pass.
        seed: of the split.

    Returns:
        "texts"; "penalty"; "mse" and "mse_of_mean", squared errors on held-out folds of the head and of the
        other folds' mean label; "r2" = 1 - mse / mse_of_mean, 0 if all labels are equal; "spearman", the mean
        over folds.

    Raises:
        ConfigError: a setting out of its range.
        InputError: not one finite label per text, an empty text, or fewer than two different texts per fold.
    """
    if folds < 2 or batch_size < 1:
        raise ConfigError(f"folds must be >= 2 and batch_size >= 1, got {folds} and {batch_size}")
    labels_N = torch.tensor(list(log2_ratios), dtype=torch.float64)
    groups: dict[Ids, int] = {}
    group_N = torch.tensor([groups.setdefault(tuple(text), len(groups)) for text in texts])
    if len(texts) != len(labels_N) or not labels_N.isfinite().all() or () in groups:
        raise InputError(
            f"every text needs a token and a finite label, got {len(texts)} texts, "
            f"{sum(not len(text) for text in texts)} of them empty, and {len(labels_N)} labels, "
            f"{int(labels_N.isfinite().sum())} of them finite; leave the others out"
        )
    if len(groups) < 2 * folds:
        raise InputError(
            f"{folds} folds need {2 * folds} different texts, got {len(groups)}; give more, or lower folds"
        )
    states_ND = end_states(compressor, texts, batch_size)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    fold_N = order[group_N] % folds
    figures = _held_out(states_ND, labels_N, fold_N)
    penalty = PENALTIES[int(_errors(states_ND, labels_N, fold_N).argmin())]
    line = _ridge(states_ND, labels_N, (penalty,))
    with torch.no_grad():
        compressor.ratio_head.weight.copy_(line.weights_PD)
        compressor.ratio_head.bias.copy_(line.at(torch.zeros_like(states_ND[:1]))[0])
    # The fingerprint covers the head; adapters that were being trained stay so.
    compressor.finish(trainable=any(value.requires_grad for _, value in compressor.trained()))
    return {"texts": len(texts), "penalty": penalty, **figures}


@torch.inference_mode()
def end_states(compressor: SoftCompressor, texts: Sequence[Sequence[int]], batch_size: int = 32) -> Tensor:
    """(N, D) float64 states of the end token, which the ratio head reads; means over pieces of long texts.

    The head is linear: its prediction of the mean is the mean of the predictions `encode` takes.
    """
    pieces = [(text, piece) for text, ids in enumerate(texts) for piece in compressor.pieces(len(ids))]
    sums_ND = torch.zeros(len(texts), compressor.ratio_head.in_features, dtype=torch.float64)
    seen: list[Tensor] = []
    hook = compressor.ratio_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        lengths = [stop - start for _, (start, stop) in pieces]
        for places in _batches(lengths, batch_size):
            batch = [pieces[place] for place in places]
            ids = [texts[text][start:stop] for text, (start, stop) in batch]
            compressor.read(ids, [compressor.config.ratio_set[0]] * len(ids))
            rows = torch.tensor([text for text, _ in batch])
            sums_ND.index_add_(0, rows, seen.pop().to("cpu", torch.float64))
    finally:
        hook.remove()
    counts_N = torch.tensor([len(compressor.pieces(len(ids))) for ids in texts], dtype=torch.float64)
    return sums_ND / counts_N[:, None]


class _Lines(NamedTuple):
    """Predictions are means_P + (states - center_D) @ weights_PD.T."""

    weights_PD: Tensor
    means_P: Tensor
    center_D: Tensor

    def at(self, states_ND: Tensor) -> Tensor:
        """(N, P) predictions."""
        shifts_NP: Tensor = (states_ND - self.center_D) @ self.weights_PD.T
        return self.means_P + shifts_NP


def _ridge(states_ND: Tensor, labels_N: Tensor, penalties: Sequence[float]) -> _Lines:
    """Least squares with penalty * N * |weights|^2 on standardized states, for every penalty at once."""
    center_D, mean = states_ND.mean(0), labels_N.mean()
    # A dimension that stands still has no say; without the guard it would divide by zero.
    scale_D = states_ND.std(0, correction=0)
    scale_D = torch.where(scale_D > 1e-9 * scale_D.max(), scale_D, torch.inf)
    scaled_ND = (states_ND - center_D) / scale_D
    values_D, axes_DD = torch.linalg.eigh(scaled_ND.T @ scaled_ND)
    target_D = axes_DD.T @ (scaled_ND.T @ (labels_N - mean))
    penalties_P1 = torch.tensor(penalties, dtype=torch.float64)[:, None] * len(labels_N)
    weights_PD = target_D / (values_D + penalties_P1) @ axes_DD.T / scale_D
    return _Lines(weights_PD, mean.expand(len(penalties)), center_D)


def _errors(states_ND: Tensor, labels_N: Tensor, fold_N: Tensor) -> Tensor:
    """(P,) squared errors on held-out folds, summed over texts."""
    errors_P = torch.zeros(len(PENALTIES), dtype=torch.float64)
    for fold in fold_N.unique():
        held_N = fold_N == fold
        lines = _ridge(states_ND[~held_N], labels_N[~held_N], PENALTIES)
        errors_P += (lines.at(states_ND[held_N]) - labels_N[held_N, None]).square().sum(0)
    return errors_P


def _held_out(states_ND: Tensor, labels_N: Tensor, fold_N: Tensor) -> dict[str, float]:
    """Figures on folds that neither the weights nor the penalty have seen."""
    errors, errors_of_mean, spearman = 0.0, 0.0, 0.0
    for fold in fold_N.unique():
        held_N = fold_N == fold
        states, labels, held = states_ND[~held_N], labels_N[~held_N], labels_N[held_N]
        penalty = PENALTIES[int(_errors(states, labels, fold_N[~held_N]).argmin())]
        predicted = _ridge(states, labels, (penalty,)).at(states_ND[held_N])[:, 0]
        errors += float((predicted - held).square().sum())
        errors_of_mean += float((labels.mean() - held).square().sum())
        # Within a fold only: across folds, the mean of the others falls where the fold's own mean rises.
        spearman += _spearman(predicted, held) * len(held) / len(labels_N)
    count = len(labels_N)
    return {
        "mse": errors / count,
        "mse_of_mean": errors_of_mean / count,
        "r2": 1 - errors / errors_of_mean if errors_of_mean else 0.0,
        "spearman": spearman,
    }


def _spearman(first_N: Tensor, second_N: Tensor) -> float:
    """Correlation of ranks; 0 if one of the two is constant."""
    first_N, second_N = (_ranks(values_N) for values_N in (first_N, second_N))
    return float(F.cosine_similarity(first_N - first_N.mean(), second_N - second_N.mean(), dim=0))


def _ranks(values_N: Tensor) -> Tensor:
    """Ranks; equal values share the mean of theirs."""
    _, inverse_N, counts = values_N.unique(return_inverse=True, return_counts=True)
    ranks_N: Tensor = (counts.cumsum(0) - (counts - 1) / 2).to(torch.float64)[inverse_N]
    return ranks_N


def _sample(compressor: SoftCompressor, document: Ids, rest: Ids, judge: Judge) -> Sample:
    instruction = REPEAT if judge == "reconstruction" else CONTINUE
    prompt: list[Ids | Slot] = chat_prompt(compressor.decoder, [Slot(0), instruction])
    target = (*document, compressor.tokenizer.eos_token_id) if judge == "reconstruction" else rest
    return Sample((document,), ((tuple(prompt), target),))


@torch.inference_mode()
def _losses(objective: Objective, samples: Sequence[Sample], ratio: int) -> list[float]:
    """Nats per target token of every sample."""
    logits_NV = objective._logits(objective._spliced(samples, *objective._soft(whole(samples, ratio))))
    targets_N = torch.tensor([token for sample in samples for token in sample.targets])
    nll_N = F.cross_entropy(logits_NV.float(), targets_N.to(logits_NV.device), reduction="none")
    return [float(part.mean()) for part in nll_N.split([len(sample.targets) for sample in samples])]


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Places of texts of similar length together, so that little of a batch is padding."""
    places = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(places), size):
        yield places[start : start + size]
