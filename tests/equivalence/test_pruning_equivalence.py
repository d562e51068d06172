"""DAC's stages on tensors against the same on a list of tokens, unit by token, stage by stage."""

from __future__ import annotations

import random

import pytest
import torch

from ctxcompress import reference
from ctxcompress.config import DACConfig
from ctxcompress.pruning import Pruning, to_remove

CASES = 60


class FakeModel:
    """Signals that change when a neighbour goes, as a language model's do; the same for the same tokens.

    Args:
        seed: of the token values.
        values: how many different ones; few make ties.
    """

    def __init__(self, seed: int, values: int) -> None:
        self._draw = random.Random(seed)
        self._values = values
        self._of_pair: dict[tuple[int, int], tuple[float, float]] = {}

    def __call__(self, left: list[int]) -> tuple[list[float], list[float]]:
        signals = [self._pair(before, token) for before, token in zip([-1, *left], left, strict=False)]
        return [nll for nll, _ in signals], [attention for _, attention in signals]

    def _pair(self, before: int, token: int) -> tuple[float, float]:
        if (before, token) not in self._of_pair:
            nll, attention = (self._draw.randrange(self._values) * 10 / self._values for _ in range(2))
            self._of_pair[before, token] = nll, attention
        return self._of_pair[before, token]


def fast_run(tokens: int, kept_fraction: float, model: FakeModel, config: DACConfig) -> list[list[int]]:
    """What is left after every stage and, in strict mode, after the final pass if it removed something."""
    pruning = Pruning(torch.arange(tokens), kept_fraction, config)
    history: list[list[int]] = []
    while not pruning.done:
        pruning.step(*(torch.tensor(row, dtype=torch.float64) for row in model(pruning.alive_A.tolist())))
        history.append(pruning.alive_A.tolist())
    if config.strict and config.schedule == "anchored":
        pruning.enforce()
        if pruning.alive_A.tolist() != (history or [list(range(tokens))])[-1]:
            history.append(pruning.alive_A.tolist())
    return history


@pytest.mark.parametrize("schedule", ["anchored", "reference"])
@pytest.mark.parametrize("no_consecutive", [True, False], ids=["rule", "no rule"])
@pytest.mark.parametrize("values", [2, 10**9], ids=["ties", "no ties"])
def test_every_stage_leaves_the_same_tokens(schedule: str, no_consecutive: bool, values: int) -> None:
    draw = random.Random(f"{schedule} {no_consecutive} {values}")
    for case in range(CASES):
        settings = {
            "alpha": draw.random(),
            "fusion": draw.choice(["additive", "multiplicative"]),
            "schedule": schedule,
            "stages": draw.choice([None, None, 1, 2, 3, 7]),
            "no_consecutive": no_consecutive,
            "strict": draw.random() < 0.7,
        }
        tokens = draw.choice([0, 1, 2, 3, draw.randint(4, 80), draw.randint(80, 350)])
        kept_fraction = draw.choice([0.0, 0.5, 1.0, draw.random(), draw.random()])
        fast = fast_run(tokens, kept_fraction, FakeModel(case, values), DACConfig(**settings))
        slow = reference.prune(
            range(tokens), kept_fraction, FakeModel(case, values), reference.Plan(**settings)
        )
        assert fast == slow, (tokens, kept_fraction, settings)


def test_correcting_the_causal_bias_is_dividing_by_the_queries_that_see_a_token() -> None:
    model = FakeModel(0, 10**9)

    def corrected(left: list[int]) -> tuple[list[float], list[float]]:
        nll, attention = model(left)
        return nll, reference.per_visible_query(attention)

    fast = fast_run(250, 0.4, model, DACConfig(correct_causal_bias=True))
    assert fast == reference.prune(range(250), 0.4, corrected, reference.Plan())
    assert fast != fast_run(250, 0.4, model, DACConfig())


@pytest.mark.parametrize("schedule", ["anchored", "reference"])
def test_every_target(schedule: str) -> None:
    plan = reference.Plan(schedule=schedule, stages=4)
    for original in (2, 3, 10, 101, 1000):
        for percent in range(0, 101, 5):
            for stage in range(1, 5):
                for left in (2, original // 2 + 1, original):
                    target = reference.stage_target(left, original, percent / 100, stage, plan)
                    removed = to_remove(left, original, percent / 100, stage, 4, schedule)
                    assert left - removed == target
