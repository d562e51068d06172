"""Training with few kernels, where PEFT, autocast and transformers compose many small operations.

A LoRA layer and its gradient are about forty operations there, a norm twenty, rotary positions thirty. A GPU
has long done each of them before the CPU has asked for the next.

Shapes: B batch, H heads, T tokens, D head size, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@contextlib.contextmanager
def few_kernels(model: nn.Module) -> Iterator[None]:
    """Inside, LoRA layers, RMS norms and rotary positions of `model` compute the same in fewer operations.

    Adapters multiply in the dtype of the base's weights, so no autocast is needed; their gradients arrive
    in their own dtype.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    norms: list[Any] = [module for module in model.modules() if hasattr(module, "variance_epsilon")]
    families: set[Any] = {sys.modules[type(module).__module__] for module in norms}
    rotations = {family: family.apply_rotary_pos_emb for family in families}
    hook = model.register_forward_pre_hook(lambda *_: _narrow(layers))
    for layer in layers:
        layer.forward = functools.partial(_lora_forward, layer)
    for norm in norms:
        norm.forward = functools.partial(_norm_forward, norm)
    for family in families:
        family.apply_rotary_pos_emb = _rotated
    try:
        yield
    finally:
        hook.remove()
        for family, rotation in rotations.items():
            family.apply_rotary_pos_emb = rotation
        for module in (*layers, *norms):
            del module.forward
        for layer in layers:
            layer.narrow = None


def _narrow(layers: list[Any]) -> None:
    """Give every layer its matrices in the base's dtype; a layer of ours has one adapter, without dropout."""
    # Adapter by adapter: raw text passes by the encoder, whose matrices then get no gradient at all.
    for adapter in {name: None for layer in layers for name in layer.lora_A}:
        own = [layer for layer in layers if adapter in layer.lora_A]
        matrices = [part[adapter].weight for layer in own for part in (layer.lora_A, layer.lora_B)]
        narrow = iter(_narrowed(own[0].base_layer.weight.dtype, *matrices))
        for layer, pair in zip(own, zip(narrow, narrow, strict=True), strict=True):
            layer.narrow = pair


def _lora_forward(layer: Any, inputs: Tensor) -> Tensor:
    (scale,) = layer.scaling.values()
    base = layer.base_layer
    output: Tensor = _lora(inputs, base.weight, base.bias, *layer.narrow, scale)
    return output


def _norm_forward(norm: Any, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    both: Tensor = _rotary(torch.cat([query, key], dim=1), cos[:, None], sin[:, None])
    turned_query, turned_key = both.split([query.shape[1], key.shape[1]], dim=1)
    return turned_query, turned_key


class _Narrowed(torch.autograd.Function):
    """All matrices in another dtype at once, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *matrices: Tensor) -> tuple[Tensor, ...]:
        ctx.wide = matrices[0].dtype
        return _cast(matrices, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_cast(gradients, ctx.wide)


def _cast(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    cast = tuple(torch.empty_like(each, dtype=dtype) for each in tensors)
    torch._foreach_copy_(cast, tensors)
    return cast


class _Lora(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T, with gradients for x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
    ) -> Tensor:
        inputs_TI = inputs.flatten(0, -2)
        inner_TR = inputs_TI @ a_RI.t()
        output_TO = F.linear(inputs_TI, weight_OI, bias_O).addmm_(inner_TR, b_OR.t(), alpha=scale)
        ctx.save_for_backward(inputs_TI, inner_TR, weight_OI, a_RI, b_OR)
        ctx.scale = scale
        output: Tensor = output_TO.unflatten(0, inputs.shape[:-1])
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs_TI, inner_TR, weight_OI, a_RI, b_OR = ctx.saved_tensors
        (gradient,) = gradients
        gradient_TO = gradient.flatten(0, -2)
        inner_gradient_TR = gradient_TO @ b_OR
        inputs_gradient = None
        if ctx.needs_input_grad[0]:
            gradient_TI = (gradient_TO @ weight_OI).addmm_(inner_gradient_TR, a_RI, alpha=ctx.scale)
            inputs_gradient = gradient_TI.unflatten(0, gradient.shape[:-1])
        # With beta 0 only the shape of the first argument counts.
        a_gradient_RI = torch.addmm(a_RI, inner_gradient_TR.t(), inputs_TI, beta=0, alpha=ctx.scale)
        b_gradient_OR = torch.addmm(b_OR, gradient_TO.t(), inner_TR, beta=0, alpha=ctx.scale)
        return inputs_gradient, None, None, a_gradient_RI, b_gradient_OR, None


class _Rotated(torch.autograd.Function):
    """Rotary positions: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) of the halves of every head."""

    @staticmethod
    def forward(ctx: Any, states_BHTD: Tensor, cos_B1TD: Tensor, sin_B1TD: Tensor) -> Tensor:
        half = states_BHTD.shape[-1] // 2
        signed_B1TD = torch.cat([-sin_B1TD[..., :half], sin_B1TD[..., half:]], dim=-1)
        ctx.save_for_backward(cos_B1TD, signed_B1TD)
        return torch.addcmul(states_BHTD * cos_B1TD, states_BHTD.roll(half, -1), signed_B1TD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos_B1TD, signed_B1TD = ctx.saved_tensors
        (gradient_BHTD,) = gradients
        half = gradient_BHTD.shape[-1] // 2
        turned_BHTD = (gradient_BHTD * signed_B1TD).roll(-half, -1)
        return torch.addcmul(turned_BHTD, gradient_BHTD, cos_B1TD), None, None


# torch does not say the type of `apply`.
_narrowed: Any = _Narrowed.apply
_lora: Any = _Lora.apply
_rotary: Any = _Rotated.apply
