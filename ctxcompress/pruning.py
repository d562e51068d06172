"""DAC's stages as arithmetic: which units of a text go, given the signals of what is left. No model, no text.

A unit is a run of tokens that stays or goes together (one token in the paper, one word by default). The first
unit is never removed by a stage: nothing predicts it and every later token leans on it.

Shapes: T tokens of the original text, A tokens still there, U units still there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctxcompress.config import DACConfig
from ctxcompress.scores import fused, per_visible_query

FREE, PREFERRED, FIRST, PROTECTED = range(4)
"""Tiers in the order in which a budget takes them: what stages may remove, what goes when nothing free is
left, the first unit, and what goes last of all."""


def stage_count(tokens: int) -> int:
    """Stages D of a text: one per 100 tokens, at least 1, at most 15 (the authors' schedule).

    Example:
        >>> [stage_count(tokens) for tokens in (80, 199, 200, 999, 1500, 4000)]
        [1, 1, 2, 9, 15, 15]
    """
    return min(max(1, tokens // 100), 15)


def to_remove(
    tokens: int, original: int, kept_fraction: float, stage: int, stages: int, schedule: str
) -> int:
    """Tokens that a stage (from 1) should remove from a text that has `tokens` left of `original`.

    "reference" keeps floor of a constant fraction tau^(1/D) of what is left, so floors add up and what the
    no-consecutive rule restores is never caught up. "anchored" aims at 1 + floor((original - 1) *
    tau^(stage/D)).
    """
    if schedule == "reference":
        stage_loss = 1 - float(kept_fraction ** (1 / stages))
        return (tokens - 1) - max(1, int((tokens - 1) * (1 - stage_loss)))
    target = 1 + max(1, math.floor((original - 1) * float(kept_fraction ** (stage / stages)) + 1e-9))
    return tokens - target


class Pruning:
    """One text on its way through the stages.

    Args:
        unit_T: (T,) int64; unit number of each token, rising.
        kept_fraction: tau in [0, 1]; fraction of the tokens after the first to keep.
        config: schedule, fusion, rule and stages.
        tier_T: (T,) int64 of FREE, PREFERRED, PROTECTED; a unit has the highest tier of its tokens. None is
            all FREE.

    Example:
        >>> pruning = Pruning(torch.arange(4), 2 / 3, DACConfig(no_consecutive=False))
        >>> while not pruning.done:
        ...     pruning.step(torch.tensor([0.0, 3.0, 1.0, 2.0]), torch.tensor([1.0, 0.4, 0.3, 0.2]))
        >>> pruning.alive_A.tolist()
        [0, 1, 2]
    """

    def __init__(
        self, unit_T: Tensor, kept_fraction: float, config: DACConfig, tier_T: Tensor | None = None
    ) -> None:
        tokens = len(unit_T)
        self._unit_T = unit_T
        self._kept_fraction = kept_fraction
        self._config = config
        self._stages = config.stages or stage_count(tokens)
        self._stage = 0
        self._limit = min(1, tokens) + math.floor(max(tokens - 1, 0) * kept_fraction + 1e-9)
        units = int(unit_T[-1]) + 1 if tokens else 0
        self._tier_U = torch.zeros(units, dtype=torch.int64)
        if tier_T is not None:
            self._tier_U.scatter_reduce_(0, unit_T, tier_T, "amax")
        self._tier_U[:1].clamp_(min=FIRST)
        self._worth_U = torch.zeros(units, dtype=torch.float64)
        self.alive_A = torch.arange(tokens)

    @property
    def stages_left(self) -> int:
        """Stages still to run, at most."""
        return 0 if self.done else self._stages - self._stage

    @property
    def done(self) -> bool:
        """Whether no stage is left, or nothing is left to remove."""
        finished = self._stage >= self._stages or len(self.alive_A) < 2
        return finished or (self._config.schedule == "anchored" and len(self.alive_A) <= self._limit)

    def step(self, nll_A: Tensor, attention_A: Tensor) -> None:
        """Run one stage on the signals of the tokens still there.

        Args:
            nll_A: (A,) float, nats; the value at position 0 is not used.
            attention_A: (A,) float, >= 0; the value at position 0 is not used.
        """
        self._stage += 1
        self._weigh(nll_A, attention_A)
        remove = to_remove(
            len(self.alive_A),
            len(self._unit_T),
            self._kept_fraction,
            self._stage,
            self._stages,
            self._config.schedule,
        )
        units, widths_U = self._present()
        free_U = self._tier_U[units] == FREE
        chosen_U = _cheapest((~free_U, self._worth_U[units]), widths_U, remove) & free_U
        if self._config.no_consecutive:
            chosen_U = _alternating(chosen_U)
        self._drop(units[chosen_U])

    def enforce(self, limit: int | None = None) -> None:
        """Remove what still exceeds `limit` tokens, tier by tier, least worth first; no neighbour rule.

        Stages weigh free units only: in the other tiers the last unit of the text goes first.
        """
        limit = self._limit if limit is None else limit
        units, widths_U = self._present()
        keys = self._tier_U[units], self._worth_U[units]
        self._drop(units[_cheapest(keys, widths_U, len(self.alive_A) - limit)])

    def _weigh(self, nll_A: Tensor, attention_A: Tensor) -> None:
        """Worth of every free unit: the mean over its tokens; other units stay out of the scaling."""
        unit_A = self._unit_T[self.alive_A]
        if self._config.correct_causal_bias:
            attention_A = per_visible_query(attention_A)
        scored_A = self._tier_U[unit_A] == FREE
        worth = fused(
            nll_A[scored_A].double(),
            attention_A[scored_A].double(),
            alpha=self._config.alpha,
            fusion=self._config.fusion,
        )
        total_U = torch.zeros_like(self._worth_U).index_add_(0, unit_A[scored_A], worth)
        count_U = torch.bincount(unit_A[scored_A], minlength=len(total_U))
        self._worth_U = torch.where(count_U > 0, total_U / count_U.clamp(min=1), self._worth_U)

    def _present(self) -> tuple[Tensor, Tensor]:
        """Numbers and token counts of the units still there, in order."""
        units, widths_U = self._unit_T[self.alive_A].unique_consecutive(return_counts=True)
        return units, widths_U

    def _drop(self, units: Tensor) -> None:
        self.alive_A = self.alive_A[~torch.isin(self._unit_T[self.alive_A], units)]


def _cheapest(keys: tuple[Tensor, ...], widths_U: Tensor, remove: int) -> Tensor:
    """Mask of the first units by `keys` (major key first) that together have at least `remove` tokens.

    Of equals the later goes first.
    """
    chosen_U = torch.zeros(len(widths_U), dtype=torch.bool)
    if remove <= 0:
        return chosen_U
    order = torch.arange(len(widths_U) - 1, -1, -1)
    for key_U in reversed(keys):
        order = order[key_U[order].sort(stable=True).indices]
    before = widths_U[order].cumsum(dim=0) - widths_U[order]
    chosen_U[order[before < remove]] = True
    return chosen_U


def _alternating(chosen_U: Tensor) -> Tensor:
    """Every second unit of each run of chosen neighbours, from its first: no two go side by side."""
    places = torch.arange(len(chosen_U))
    last_kept = torch.where(chosen_U, -1, places).cummax(dim=0).values
    return chosen_U & ((places - last_kept) % 2 == 1)
