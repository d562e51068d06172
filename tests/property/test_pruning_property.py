"""What holds for every pruned text, whatever its length, units, protection, budget and signals."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctxcompress.config import DACConfig
from ctxcompress.pruning import FREE, PREFERRED, PROTECTED, Pruning

examples = settings(max_examples=int(os.environ.get("CTXCOMPRESS_MAX_EXAMPLES", "50")), deadline=None)

CASES = 10_000


@st.composite
def runs(draw: st.DrawFn, **fixed: object) -> tuple[Tensor, float, DACConfig, Tensor, int]:
    """Unit numbers, tau, settings, tiers, and a seed for signals."""
    widths = torch.tensor(draw(st.lists(st.integers(1, 4), max_size=60)), dtype=torch.int64)
    unit_T = torch.arange(len(widths)).repeat_interleave(widths)
    choices = {
        "alpha": draw(st.floats(0, 1)),
        "schedule": draw(st.sampled_from(["anchored", "reference"])),
        "fusion": draw(st.sampled_from(["additive", "multiplicative"])),
        "stages": draw(st.none() | st.integers(1, 8)),
        "no_consecutive": draw(st.booleans()),
        "correct_causal_bias": draw(st.booleans()),
    }
    config = DACConfig(**{**choices, **fixed})
    seed = draw(st.integers(0, 2**31))
    part = draw(st.sampled_from([0.0, 0.3, 1.0]))  # of the tokens protected
    generator = torch.Generator().manual_seed(seed)
    protected_T = torch.rand(len(unit_T), generator=generator) < part
    tier_T = torch.where(protected_T, PROTECTED, FREE)
    return unit_T, draw(st.floats(0, 1)), config, tier_T, seed


def stages(pruning: Pruning, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens before and after every stage, on random signals."""
    generator = torch.Generator().manual_seed(seed)
    while not pruning.done:
        before = pruning.alive_A.tolist()
        # Few values, so that ties are common.
        nll_A, attention_A = torch.randint(0, 6, (2, len(before)), generator=generator).float()
        pruning.step(nll_A, attention_A)
        yield before, pruning.alive_A.tolist()


@examples
@given(runs())
def test_what_is_left_shrinks_in_order_and_units_stay_whole(
    run: tuple[Tensor, float, DACConfig, Tensor, int],
) -> None:
    unit_T, kept_fraction, config, tier_T, seed = run
    pruning = Pruning(unit_T, kept_fraction, config, tier_T)
    widths = unit_T.bincount().tolist()
    protected = set(unit_T[tier_T == PROTECTED].tolist())
    for before, after in stages(pruning, seed):
        assert after == sorted(set(after) & set(before))
        units = unit_T[after].tolist()
        assert all(units.count(unit) == widths[unit] for unit in set(units))
        assert {0, *protected} <= set(units)
    assert pruning.stages_left == 0
    left = set(pruning.alive_A.tolist())
    pruning.enforce()
    assert set(pruning.alive_A.tolist()) <= left
    assert pruning.alive_A.tolist() == sorted(pruning.alive_A.tolist())


@examples
@given(runs(no_consecutive=True))
def test_no_two_neighbours_go_in_one_stage(run: tuple[Tensor, float, DACConfig, Tensor, int]) -> None:
    unit_T, kept_fraction, config, tier_T, seed = run
    for before, after in stages(Pruning(unit_T, kept_fraction, config, tier_T), seed):
        present = unit_T[before].unique_consecutive().tolist()
        kept = set(unit_T[after].tolist())
        for left, right in itertools.pairwise(present):
            assert left in kept or right in kept


@examples
@given(runs(no_consecutive=False, schedule="anchored"))
def test_without_the_rule_and_protection_stages_meet_the_budget_by_themselves(
    run: tuple[Tensor, float, DACConfig, Tensor, int],
) -> None:
    unit_T, kept_fraction, config, _, seed = run
    pruning = Pruning(unit_T, kept_fraction, config)
    for _ in stages(pruning, seed):
        pass
    first, budget = int((unit_T == 0).sum()), 1 + int((len(unit_T) - 1) * kept_fraction + 1e-9)
    # A stage never takes the first unit and, at tau = 0, leaves one token beside it.
    assert len(pruning.alive_A) <= max(budget, first, 2)


@examples
@given(st.integers(2, 200), st.floats(0, 1), st.integers(1, 15), st.integers(0, 2**31))
def test_strict_meets_the_budget_exactly_when_units_are_tokens(
    tokens: int, kept_fraction: float, stage_number: int, seed: int
) -> None:
    pruning = Pruning(torch.arange(tokens), kept_fraction, DACConfig(stages=stage_number))
    for _ in stages(pruning, seed):
        pass
    pruning.enforce()
    assert len(pruning.alive_A) == 1 + int((tokens - 1) * kept_fraction + 1e-9)
    assert int(pruning.alive_A[0]) == 0


def random_signals(generator: torch.Generator, size: int, kind: int) -> Tensor:
    """Two rows: all different, with many ties, constant, or zeros."""
    if kind == 0:
        return torch.rand(2, size, generator=generator) * 20
    if kind == 1:
        return torch.randint(0, 3, (2, size), generator=generator).float()
    return torch.full((2, size), 2.5 if kind == 2 else 0.0)


def test_strict_never_exceeds_the_budget() -> None:
    """The promise of the library, on 10,000 random texts."""
    generator = torch.Generator().manual_seed(20250716)
    draws = torch.rand(CASES, 8, generator=generator).tolist()
    exceeded = []
    for case, (length, wide, part, kept, alpha, kind, number, rule) in enumerate(draws):
        # Short texts are where the edges are: half of the cases have at most 50 tokens.
        tokens = int(401 * length**4)
        jumps_T = torch.rand(tokens, generator=generator) < 1 / (1 + 4 * wide)  # mean width of a unit: 1 to 5
        jumps_T[:1] = False
        unit_T = jumps_T.long().cumsum(0)
        tier_T = torch.randint(0, 3, (tokens,), generator=generator)
        tier_T = torch.tensor([FREE, PREFERRED, PROTECTED])[tier_T]
        tier_T[torch.rand(tokens, generator=generator) >= part - 0.3] = FREE  # a third have no protection
        budget = int((tokens + 1) * kept**2)
        config = DACConfig(
            alpha=alpha,
            fusion="additive" if alpha < 0.7 else "multiplicative",
            stages=None if number < 0.7 else int(number * 15),
            no_consecutive=rule < 0.8,
            correct_causal_bias=rule < 0.2,
        )
        pruning = Pruning(unit_T, max(budget - 1, 0) / max(tokens - 1, 1), config, tier_T)
        while not pruning.done:
            pruning.step(*random_signals(generator, len(pruning.alive_A), int(kind * 4)))
        pruning.enforce()
        if len(pruning.alive_A) > max(budget, min(tokens, 1)):
            exceeded.append((case, len(pruning.alive_A), budget))
        pruning.enforce(budget)
        if len(pruning.alive_A) > budget:
            exceeded.append((case, len(pruning.alive_A), budget))
    assert not exceeded


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_texts_too_short_to_prune(tokens: int) -> None:
    for kept_fraction in (0.0, 0.5, 1.0):
        pruning = Pruning(torch.arange(tokens), kept_fraction, DACConfig())
        for _ in stages(pruning, seed=0):
            pass
        pruning.enforce(tokens)
        assert len(pruning.alive_A) == tokens
        pruning.enforce(0)
        assert len(pruning.alive_A) == 0
