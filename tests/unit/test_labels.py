"""Labels of the ratio head, and the head in closed form."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch

from ctxcompress import Backbone
from ctxcompress.config import SoftConfig
from ctxcompress.errors import ConfigError, InputError
from ctxcompress.prompt import CONTINUE, REPEAT, chat_prompt
from ctxcompress.soft import SoftCompressor
from ctxcompress.train.data import Batch, Sample, Slot
from ctxcompress.train.labels import (
    Judge,
    _ridge,
    _spearman,
    compressibility,
    cut,
    end_states,
    fit_ratio_head,
    within,
)
from ctxcompress.train.losses import Objective

RATIOS = (2, 4, 8)


@pytest.fixture
def soft(backbone: Backbone) -> SoftCompressor:
    torch.manual_seed(0)
    config = SoftConfig(ratio_set=RATIOS, encoder_layers=2, converter_size=16, encoder_rank=2, window=64)
    compressor = SoftCompressor(backbone, config)
    compressor.finish()
    return compressor


def texts(number: int, shortest: int = 3, longest: int = 20) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(5, 300) for _ in range(draw.randint(shortest, longest))] for _ in range(number)]


@pytest.mark.parametrize(
    ("losses", "tolerance", "label"),
    [
        # Limit 1.5: between 4x (1.25) and 8x (2.25) a quarter of the way, log2 = 2 + 0.25.
        ([1.0, 1.25, 2.25], 0.5, 2.25),
        ([1.0, 1.25, 1.5], 0.5, 3.0),  # never beyond
        ([1.0, 1.25, 1.5], 0.0, 1.0),  # beyond at once
        ([1.0, 2.0, 0.5], 0.5, 1.5),  # better again later, which does not count
        ([1.0, 0.5, 2.5], 0.5, 2.5),  # limit 1.5 is half-way from 0.5 to 2.5
    ],
)
def test_within_by_hand(losses: list[float], tolerance: float, label: float) -> None:
    assert within([1.0, 2.0, 3.0], losses, tolerance) == pytest.approx(label)


@pytest.mark.parametrize("judge", ["reconstruction", "continuation"])
def test_labels_follow_the_training_loss_of_each_text(soft: SoftCompressor, judge: Judge) -> None:
    # The random model is as bad at every ratio, so a small tolerance is what is crossed in between.
    given, tolerance = texts(7), 0.02
    labels = compressibility(soft, given, tolerance=tolerance, tokens=12, batch_size=3, judge=judge)
    objective = Objective(soft, 0.0)
    expected = []
    for text in given:
        if judge == "reconstruction":
            document = tuple(text[:12])
            target, instruction = (*document, soft.tokenizer.eos_token_id), REPEAT
        else:
            half = min(12, len(text) // 2)
            document, target, instruction = tuple(text[:half]), tuple(text[half : 2 * half]), CONTINUE
        prompt = tuple(chat_prompt(soft.decoder, [Slot(0), instruction]))
        with torch.no_grad():
            losses = [
                float(objective(Batch(judge, ratio, (Sample((document,), ((prompt, target),)),)))["nll"])
                for ratio in RATIOS
            ]
        expected.append(within([1.0, 2.0, 3.0], losses, tolerance))
    assert labels == pytest.approx(expected, abs=1e-3)
    assert len({round(label, 3) for label in labels}) > 3


def test_labels_stay_in_the_set(soft: SoftCompressor) -> None:
    seen: list[tuple[int, int]] = []
    labels = compressibility(
        soft,
        texts(3),
        tolerance=1e6,
        batch_size=2,
        progress=lambda _, done, total: seen.append((done, total)),
    )
    assert labels == [3.0, 3.0, 3.0]
    assert seen == [(2, 3), (3, 3)]
    assert compressibility(soft, []) == []


def test_cut_is_what_is_labelled() -> None:
    assert cut([[1, 2, 3], [4]], 2) == [(1, 2), (4,)]
    # The first half; its second half is what has to be said.
    assert cut([[1, 2, 3, 4, 5], [1, 2, 3]], 4, "continuation") == [(1, 2), (1,)]
    with pytest.raises(InputError, match=r"got 1 tokens in text number 2"):
        cut([[1, 2], [3]], 4, "continuation")


@pytest.mark.parametrize("settings", [{"tolerance": -1.0}, {"tokens": 65}, {"batch_size": 0}, {"judge": "x"}])
def test_settings_are_checked(soft: SoftCompressor, settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"tolerance|judge"):
        compressibility(soft, texts(2), **settings)


def test_end_states_are_what_the_head_reads(soft: SoftCompressor) -> None:
    # 130 tokens are three pieces of a window of 64.
    given = [*texts(4), texts(1, 130, 130)[0]]
    states_ND = end_states(soft, given, batch_size=2)
    head = soft.ratio_head
    predicted = states_ND @ head.weight[0].double() + head.bias.double()
    assert predicted.tolist() == pytest.approx([text.log2_ratio for text in soft.encode(given)], abs=1e-4)
    assert not head._forward_pre_hooks


def predictions(compressor: SoftCompressor, given: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor([text.log2_ratio for text in compressor.encode(given)])


def test_a_linear_truth_is_found(soft: SoftCompressor) -> None:
    given = texts(120)
    states_ND = end_states(soft, given)
    labels_N = 3 + states_ND @ torch.linspace(-1, 1, states_ND.shape[1], dtype=torch.float64)
    before, fingerprint = {name: value.clone() for name, value in soft.trained()}, soft.fingerprint
    figures = fit_ratio_head(soft, given, labels_N.tolist())
    assert (predictions(soft, given) - labels_N).abs().max() < 0.02
    assert figures["r2"] > 0.999
    assert figures["spearman"] > 0.99
    assert figures["texts"] == 120
    changed = {name for name, value in soft.trained() if not torch.equal(value, before[name])}
    assert changed == {"ratio_head.weight", "ratio_head.bias"}
    assert soft.fingerprint != fingerprint
    assert not any(value.requires_grad for value in soft.parameters())


def test_noise_leaves_the_mean(soft: SoftCompressor) -> None:
    given = texts(200)
    labels_N = 3 + torch.randn(200, generator=torch.Generator().manual_seed(0))
    figures = fit_ratio_head(soft, given, labels_N.tolist())
    # Labels vary with a standard deviation of 1; predictions hardly do.
    assert float(predictions(soft, given).std()) < 0.2
    assert float(predictions(soft, given).mean()) == pytest.approx(float(labels_N.mean()), abs=0.01)
    assert -0.1 < figures["r2"] < 0.05
    assert abs(figures["spearman"]) < 0.2


def test_copies_of_a_text_teach_nothing_about_each_other(soft: SoftCompressor) -> None:
    # Noise again, but every text is there eight times: with copies in several folds, r2 would be high.
    given = texts(40) * 8
    labels = torch.randn(40, generator=torch.Generator().manual_seed(0)).tolist() * 8
    assert fit_ratio_head(soft, given, labels)["r2"] < 0.1


def test_equal_labels_and_adapters_in_training(soft: SoftCompressor) -> None:
    soft.finish(trainable=True)
    figures = fit_ratio_head(soft, texts(10), [2.5] * 10)
    assert (figures["r2"], figures["spearman"], figures["mse"]) == (0.0, 0.0, 0.0)
    assert predictions(soft, texts(3)).tolist() == pytest.approx([2.5] * 3)
    assert all(value.requires_grad for _, value in soft.trained())


def test_ridge_by_hand() -> None:
    # States 0 and 4: mean 2, deviation 2, standardized -1 and 1, Gram 2; labels 1 and 3: mean 2, product 2.
    # Penalty 1 x 2 texts: weight 2 / (2 + 2) = 0.5 per deviation, so 2.5 at state 4, and 1.5 at 0.
    # The second dimension stands still and has no say.
    states = torch.tensor([[0.0, 7.0], [4.0, 7.0]], dtype=torch.float64)
    lines = _ridge(states, torch.tensor([1.0, 3.0], dtype=torch.float64), (1.0, 0.0))
    assert lines.at(states)[:, 0].tolist() == pytest.approx([1.5, 2.5])
    assert lines.at(torch.tensor([[4.0, 99.0]], dtype=torch.float64))[:, 0].tolist() == pytest.approx([2.5])


@pytest.mark.parametrize(
    ("first", "second", "correlation"),
    [
        ([1.0, 2.0, 3.0], [10.0, 30.0, 20.0], 0.5),  # 1 - 6 (0 + 1 + 1) / (3 x 8)
        # Ranks 1.5 1.5 3 4 and 1 2 3 4, less 2.5: (1.5 + 0.5 + 0.25 + 2.25) / sqrt(4.5 x 5)
        ([1.0, 1.0, 5.0, 6.0], [1.0, 2.0, 3.0, 4.0], 4.5 / math.sqrt(22.5)),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], 0.0),
    ],
)
def test_spearman_by_hand(first: list[float], second: list[float], correlation: float) -> None:
    assert _spearman(torch.tensor(first), torch.tensor(second)) == pytest.approx(correlation)


def test_what_cannot_be_fitted(soft: SoftCompressor) -> None:
    given = texts(12)
    with pytest.raises(InputError, match="12 texts, 0 of them empty, and 11 labels"):
        fit_ratio_head(soft, given, [1.0] * 11)
    with pytest.raises(InputError, match="12 labels, 11 of them finite"):
        fit_ratio_head(soft, given, [*[1.0] * 11, math.nan])
    with pytest.raises(InputError, match="1 of them empty"):
        fit_ratio_head(soft, [*given, []], [1.0] * 13)
    with pytest.raises(InputError, match="need 10 different texts, got 1"):
        fit_ratio_head(soft, [given[0]] * 12, [1.0] * 12)
    with pytest.raises(ConfigError, match="folds"):
        fit_ratio_head(soft, given, [1.0] * 12, folds=1)
