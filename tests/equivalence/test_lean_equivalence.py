"""Losses and gradients in few kernels against PEFT's layers and transformers' norms and rotations."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from ctxcompress import Backbone
from ctxcompress.config import SoftConfig
from ctxcompress.soft import SoftCompressor
from ctxcompress.train.data import Batch, Sample, Slot
from ctxcompress.train.lean import few_kernels
from ctxcompress.train.losses import Objective

SIZES = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
    "pad_token_id": 0,
}  # fmt: skip
BEFORE, BETWEEN, AFTER = (5, 6), (7,), (1, 2, 8)
SAMPLES = (
    Sample(
        (tuple(range(20, 27)), (30, 31, 32)),
        (((BEFORE, Slot(0), BETWEEN, Slot(1), AFTER), (40, 41, 0)), (((9, 10),), (42, 0))),
        gold=(1,),
    ),
    Sample((tuple(range(50, 62)),), (((BEFORE, Slot(0), AFTER), (43, 0)),)),
)


@pytest.fixture(params=[LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def objective(request: pytest.FixtureRequest, backbone: Backbone) -> Objective:
    """Of a random model of each family; queries, keys and values of Qwen2 have biases, Qwen3 norms heads."""
    torch.manual_seed(0)
    settings: PreTrainedConfig = request.param(**SIZES)
    base = Backbone(AutoModelForCausalLM.from_config(settings), backbone.tokenizer)
    with torch.no_grad():
        for name, parameter in base.model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.normal_(1.0, 0.3)
    compressor = SoftCompressor(
        base,
        SoftConfig(ratio_set=(2, 4), encoder_layers=2, converter_size=16, encoder_rank=3, decoder_rank=2),
    )
    compressor.finish(trainable=True)
    with torch.no_grad():
        for name, parameter in compressor.trained():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return Objective(compressor, 0.5, attention=0.3, heads=[(0, 1), (2, 3)])


def learnt(objective: Objective, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Losses, and the gradient of everything that is trained."""
    objective.zero_grad(set_to_none=True)
    losses = objective(batch)
    losses["loss"].backward()
    return losses, {name: value.grad for name, value in objective.compressor.trained()}


@pytest.mark.parametrize("ratio", [1, 4])
def test_losses_and_gradients_are_the_same(objective: Objective, ratio: int) -> None:
    batch = Batch("answer", ratio, SAMPLES)
    losses, gradients = learnt(objective, batch)
    with few_kernels(objective):
        few_losses, few_gradients = learnt(objective, batch)
    assert losses.keys() == few_losses.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(few_losses[name], loss, atol=1e-5, rtol=1e-5)
    assert sum(gradient is not None for gradient in gradients.values()) > 20
    for name, gradient in gradients.items():
        # Raw text passes by the encoder, which then has no gradient; of zeros would still move it.
        assert (gradient is None) == (few_gradients[name] is None), name
        # Sums of large terms: their rounding, which differs between processors, is a part of the largest.
        size = float(gradient.abs().max()) if gradient is not None else 1.0
        torch.testing.assert_close(few_gradients[name], gradient, atol=1e-4 * size, rtol=1e-4, msg=name)


def test_everything_is_as_before_afterwards(objective: Objective) -> None:
    modules = {sys.modules[type(layer).__module__] for layer in objective.compressor.encoder.layers}
    (family,) = modules
    rotation = family.apply_rotary_pos_emb
    inside = []
    with contextlib.suppress(KeyboardInterrupt), few_kernels(objective):
        inside.append(family.apply_rotary_pos_emb)
        raise KeyboardInterrupt
    assert inside != [rotation]
    assert family.apply_rotary_pos_emb is rotation
    assert not any("forward" in vars(module) for module in objective.modules())


def test_gradients_of_narrow_layers_arrive_wide(objective: Objective) -> None:
    objective.compressor.encoder.to(torch.bfloat16)
    objective.compressor.decoder_model.to(torch.bfloat16)
    objective.compressor.finish(trainable=True)
    with few_kernels(objective):
        losses, gradients = learnt(objective, Batch("answer", 4, SAMPLES))
    assert torch.isfinite(losses["loss"])
    reached = [gradient for gradient in gradients.values() if gradient is not None]
    assert {gradient.dtype for gradient in reached} == {torch.float32}
    assert all(torch.isfinite(gradient).all() for gradient in reached)
