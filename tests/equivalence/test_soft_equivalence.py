"""Pooling, selector, converter and splice on tensors against the same on plain numbers."""

from __future__ import annotations

import inspect
import math
import random

import pytest
import torch
from torch import Tensor

from ctxcompress import Backbone, pooling, reference, selector
from ctxcompress.backbone import splice
from ctxcompress.config import SoftConfig
from ctxcompress.pooling import pool
from ctxcompress.selector import fitted_scale, select_length, select_ratio
from ctxcompress.soft import Converter, Features, SoftCompressor

CASES = 300
both_alignments = pytest.mark.parametrize("alignment", ["start", "end"])
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def exact(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def within_twice_the_naive_error(fast: Tensor, naive: Tensor, slow: Tensor) -> None:
    """Fast may err by no more than twice what the same arithmetic done plainly in its precision errs."""
    size = max(1.0, float(slow.abs().max()))
    error, naive_error = (float((values.double() - slow).abs().max()) for values in (fast, naive))
    assert error <= 2 * naive_error + 8 * torch.finfo(torch.float32).eps * size
    # If both were far off, it would be the reference that is wrong.
    assert naive_error <= 4 * torch.finfo(naive.dtype).eps * size


@pytest.mark.parametrize("module", [pooling, selector])
def test_every_function_has_a_slow_twin(module: object) -> None:
    functions = inspect.getmembers(module, inspect.isfunction)
    ours = {name for name, one in functions if one.__module__ == module.__name__ and not name.startswith("_")}
    assert ours
    assert ours <= set(vars(reference))


@both_dtypes
@both_alignments
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 64, 101])
def test_pool(tokens: int, alignment: str, dtype: torch.dtype) -> None:
    states_TD = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    ones_T = torch.ones(tokens, dtype=dtype)
    for factor in (1, 2, 3, 8, 200):
        means_GD, counts_G = pool(states_TD, ones_T, factor, alignment)
        slow = reference.window_means(states_TD.tolist(), factor, alignment)
        naive = torch.stack(
            [
                states_TD[start:stop].sum(dim=0) / (stop - start)
                for start, stop in reference.spans_of(tokens, factor, alignment)
            ]
        )
        assert means_GD.dtype == dtype
        within_twice_the_naive_error(means_GD, naive, exact(slow))
        assert counts_G.tolist() == reference.pool(states_TD.tolist(), [1] * tokens, factor, alignment)[1]


@both_alignments
@pytest.mark.parametrize("tokens", [1, 5, 9, 16, 33, 100])
def test_pooling_again(tokens: int, alignment: str) -> None:
    states_TD = torch.randn(tokens, 4, generator=torch.Generator().manual_seed(tokens))
    fine = pool(states_TD, torch.ones(tokens), 2, alignment)
    for factor in (2, 4):
        means_GD, counts_G = pool(*fine, factor, alignment)
        slow_means, slow_counts = reference.pool(fine[0].tolist(), fine[1].tolist(), factor, alignment)
        torch.testing.assert_close(means_GD.double(), exact(slow_means), rtol=0, atol=1e-6)
        assert counts_G.tolist() == slow_counts
        straight = reference.window_means(states_TD.tolist(), 2 * factor, alignment)
        torch.testing.assert_close(means_GD.double(), exact(straight), rtol=0, atol=1e-6)


def test_windows() -> None:
    for tokens in range(200):
        for ratio in (1, 2, 3, 8, 32):
            assert pooling.windows(tokens, ratio) == reference.windows(tokens, ratio)


@pytest.mark.parametrize("space", ["log", "linear"])
def test_selector(space: str) -> None:
    draw = random.Random(space)
    for _ in range(CASES):
        legal = draw.choice([(2, 4, 8, 16, 32), (2, 6, 10), draw.sample(range(1, 70), draw.randint(1, 6))])
        # Halves lie midway between the logarithms of powers of two.
        log2_ratio = draw.choice([draw.randint(-2, 14) / 2, draw.uniform(-2, 7)])
        scale = draw.choice([0.0, 0.5, -1.0, draw.uniform(-2, 2)])
        tokens = draw.choice([2 ** draw.randint(0, 11), draw.randint(1, 2000)])
        settings = {"ratio_scale": scale, "space": space}
        case = (log2_ratio, legal, tokens, settings)
        assert select_ratio(log2_ratio, legal, **settings).value == reference.select_ratio(
            log2_ratio, legal, **settings
        ), case
        assert select_length(log2_ratio, tokens, legal, **settings).value == reference.select_length(
            log2_ratio, tokens, legal, **settings
        ), case


@pytest.mark.parametrize("seed", range(40))
def test_fitted_scale(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 12)
    log2_ratios = [draw.uniform(-1, 6) for _ in range(count)]
    tokens = [draw.randint(1, 300) for _ in range(count)]
    least = sum(-(-n // 32) for n in tokens)
    for budget in (least, draw.randint(least, sum(tokens)), sum(tokens)):
        _, chosen = fitted_scale(log2_ratios, tokens, (1, 2, 4, 8, 16, 32), budget)
        slow = reference.fitted_scale(log2_ratios, tokens, [1, 2, 4, 8, 16, 32], budget)
        assert [one.value for one in chosen] == slow


def random_converter(residual: bool) -> Converter:
    torch.manual_seed(1)
    converter = Converter(6, 9, 5 if not residual else 6, 1.7, residual)
    torch.nn.init.uniform_(converter.norm.weight, 0.5, 1.5)
    return converter


def weights_of(converter: Converter) -> reference.ConverterWeights:
    return reference.ConverterWeights(
        converter.norm.weight.tolist(),
        converter.up.weight.tolist(),
        converter.down.weight.tolist(),
        float(converter.scale.detach()),
    )


def random_features(size: float) -> Features:
    generator = torch.Generator().manual_seed(2)
    states_BMD, embeddings_BMD = (torch.randn(1, 7, 6, generator=generator) * size for _ in range(2))
    return Features(states_BMD, embeddings_BMD, torch.tensor([[8.0, 8, 3, 1, 2, 32, 5]]))


def slow_soft(converter: Converter, features: Features) -> Tensor:
    weights = weights_of(converter)
    rows = zip(
        features.states_BMD[0].tolist(),
        features.embeddings_BMD[0].tolist(),
        features.counts_BM[0].tolist(),
        strict=True,
    )
    return exact(
        [
            reference.convert(state, weights, embedding if converter.residual else None, count)
            for state, embedding, count in rows
        ]
    )


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "learned only"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_converter(size: float, residual: bool) -> None:
    converter, features = random_converter(residual), random_features(size)
    slow = slow_soft(converter, features)
    # Float32 throughout: a few rounding errors of the largest number.
    tolerance = 16 * torch.finfo(torch.float32).eps * max(1.0, float(slow.abs().max()))
    torch.testing.assert_close(converter(features)[0].double(), slow, rtol=0, atol=tolerance)


def test_gradients_of_the_converter() -> None:
    converter, features = random_converter(residual=True).double(), random_features(1.0)
    features = Features(
        *(part.double() for part in (features.states_BMD, features.embeddings_BMD, features.counts_BM))
    )
    features.states_BMD.requires_grad_()
    converter(features).pow(2).sum().backward()
    step = 1e-5
    for tensor in (features.states_BMD, *converter.parameters()):
        values, gradient = tensor.data.view(-1), tensor.grad.view(-1)
        place = len(values) // 2
        totals = []
        for move in (step, -2 * step):
            values[place] += move
            totals.append(float(slow_soft(converter, features).pow(2).sum()))
        values[place] += step
        assert float(gradient[place]) == pytest.approx((totals[0] - totals[1]) / (2 * step), rel=1e-5)


def test_splice() -> None:
    torch.manual_seed(3)
    embed = torch.nn.Embedding(11, 4)
    soft_MD = torch.randn(3, 4)
    segments = [(1, 2, 10), soft_MD, (0,), soft_MD[:1], (5, 5)]
    plain = [list(part) if isinstance(part, tuple) else part.tolist() for part in segments]
    rows_TD = splice(segments, embed)
    assert rows_TD.tolist() == reference.splice(plain, embed.weight.tolist())


@torch.no_grad()
def test_from_states_to_soft_tokens(backbone: Backbone) -> None:
    """The whole way of one text: only the encoder's states and the embedding table come from tensors."""
    torch.manual_seed(4)
    compressor = SoftCompressor(
        backbone, SoftConfig(ratio_set=(2, 4, 8), window=64, converter_size=16, encoder_rank=2)
    )
    compressor.finish()
    ids = [(7 * place) % 300 + 3 for place in range(45)]
    # The end token is read with the text and is no part of a window. A mask of ones: all see all.
    seen = torch.ones(1, 1, 46, 46, dtype=torch.bool)
    ids_1T = torch.tensor([[*ids, backbone.tokenizer.eos_token_id]])
    states = compressor.encoder(ids_1T, attention_mask=seen, use_cache=False).last_hidden_state[0, :-1]
    table = backbone.model.get_input_embeddings().weight
    weights = weights_of(compressor.converter)
    for ratio in (2, 4, 8):
        means = reference.window_means(states.tolist(), ratio)
        words = reference.window_means(table[ids].tolist(), ratio)
        counts = [min(ratio, 45 - start) for start in range(0, 45, ratio)]
        slow = [
            reference.convert(*row) for row in zip(means, [weights] * len(means), words, counts, strict=True)
        ]
        soft = compressor.soft_tokens(compressor.encode([ids])[0], ratio)
        assert len(soft) == reference.windows(45, ratio) == math.ceil(45 / ratio)
        torch.testing.assert_close(soft.embeddings_MD.double(), exact(slow), rtol=1e-4, atol=1e-4)
