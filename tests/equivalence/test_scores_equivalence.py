"""Every equation on tensors against the same equation on plain numbers."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from torch import Tensor

from ctxcompress import budgets, pruning, reference, scores

DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float32, {"rtol": 1e-5, "atol": 1e-6}, id="fp32"),
        pytest.param(torch.float64, {"rtol": 1e-12, "atol": 1e-13}, id="fp64"),
    ],
)
SEEDS = pytest.mark.parametrize("seed", range(5))
DOCUMENTS = [1, 2, 3, 10, 100]


def draws(seed: int, *size: int) -> Tensor:
    """Random numbers in [0, 1), exact in both precisions."""
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed))


def same(fast: Tensor, slow: list[float], tolerance: dict[str, float]) -> None:
    torch.testing.assert_close(fast.double(), torch.tensor(slow, dtype=torch.float64), **tolerance)


@pytest.mark.parametrize("module", [scores, budgets])
def test_every_equation_has_a_slow_twin(module: object) -> None:
    functions = inspect.getmembers(module, inspect.isfunction)
    ours = {name for name, one in functions if one.__module__ == module.__name__ and not name.startswith("_")}
    assert ours
    assert ours <= set(vars(reference))


@DTYPES
@SEEDS
def test_mean_nll(seed: int, dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    nll_T = draws(seed, 60).to(dtype) * 12
    cuts = sorted({0, 60, *(draws(seed + 9, 6) * 60).long().tolist()})
    segments = list(itertools.pairwise(cuts))
    same(scores.mean_nll(nll_T, segments), reference.mean_nll(nll_T.tolist(), segments), tolerance)


@DTYPES
@SEEDS
def test_attention_mass(seed: int, dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    mass_LHN = draws(seed, 3, 4, DOCUMENTS[seed]).to(dtype)
    per_head = mass_LHN.flatten(0, 1).tolist()
    same(scores.attention_mass(mass_LHN), reference.attention_mass(per_head), tolerance)
    same(scores.attention_mass(mass_LHN * 0), reference.attention_mass([[0.0] * DOCUMENTS[seed]]), tolerance)


@DTYPES
@SEEDS
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("ppl_sign", [-1, 1])
@pytest.mark.parametrize("nll_scale", ["sum", "mean"])
def test_importance(
    seed: int, alpha: float, ppl_sign: int, nll_scale: str, dtype: torch.dtype, tolerance: dict[str, float]
) -> None:
    attention_N, nll_N = draws(seed, 2, DOCUMENTS[seed]).to(dtype)
    settings = {"alpha": alpha, "ppl_sign": ppl_sign, "nll_scale": nll_scale}
    for nll in (nll_N * 5, nll_N * 0):
        fast = scores.importance(attention_N, nll, **settings)
        same(fast, reference.importance(attention_N.tolist(), nll.tolist(), **settings), tolerance)


@DTYPES
@SEEDS
@pytest.mark.parametrize("temperature", [1.0, 0.1, 1e-3])
def test_shares(seed: int, temperature: float, dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    scores_N = draws(seed, DOCUMENTS[seed]).to(dtype) * 4 - 2
    same(scores.shares(scores_N, temperature), reference.shares(scores_N.tolist(), temperature), tolerance)


@DTYPES
@SEEDS
def test_attention_evidence(seed: int, dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    question_LHN, baseline_LHN = draws(seed, 2, 3, 4, DOCUMENTS[seed]).to(dtype)
    heads = [(0, 1), (2, 3), (2, 0)]
    slow = reference.attention_evidence(
        *(mass_LHN.flatten(0, 1).tolist() for mass_LHN in (question_LHN, baseline_LHN)),
        [4 * layer + head for layer, head in heads],
    )
    same(scores.attention_evidence(question_LHN, baseline_LHN, heads), slow, tolerance)


@DTYPES
@SEEDS
@pytest.mark.parametrize("function", ["standardised", "minmax", "per_visible_query"])
def test_functions_of_one_vector(
    seed: int, function: str, dtype: torch.dtype, tolerance: dict[str, float]
) -> None:
    values_T = draws(seed, 50).to(dtype) * 30
    for values in (values_T, values_T[:1], values_T[:0], torch.full_like(values_T, 0.5)):
        fast, slow = getattr(scores, function), getattr(reference, function)
        same(fast(values), slow(values.tolist()), tolerance)


@DTYPES
@SEEDS
@pytest.mark.parametrize("fusion", ["additive", "multiplicative"])
def test_fused(seed: int, fusion: str, dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    nll_T, attention_T = draws(seed, 2, 80).to(dtype) * 15
    settings = {"alpha": 0.1 + 0.2 * seed, "fusion": fusion}
    fast = scores.fused(nll_T, attention_T, **settings)
    same(fast, reference.fused(nll_T.tolist(), attention_T.tolist(), **settings), tolerance)


def test_stage_count() -> None:
    assert all(pruning.stage_count(size) == reference.stage_count(size) for size in range(2500))
