"""FSDP: a compressor whose weights are spread over the processes that train it.

What is trained is a copy on the devices, in shards; the compressor it was copied from stays whole, on the
CPU, and takes the trained values whenever they are saved. FSDP gathers the weights of a layer when the layer
is called, so they are never read past it: no `lean.few_kernels` here.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ctxcompress.errors import ConfigError
from ctxcompress.soft import SoftCompressor
from ctxcompress.train.recipe import Recipe


def sharding_asked_for(accelerator: Any, recipe: Recipe) -> bool:
    """Whether `accelerate launch` asks for FSDP.

    Raises:
        ConfigError: for its first version, or for batches that processes would not read in the same passes.
    """
    from accelerate.utils import DistributedType  # type: ignore[import-untyped]

    if accelerator.distributed_type != DistributedType.FSDP:
        return False
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    if not accelerator.is_fsdp2:
        raise ConfigError("FSDP must be of version 2, got 1; launch with --fsdp_version 2")
    if recipe.mixed:
        raise ConfigError(
            "mixed must be 0 under FSDP, where all processes have to make the same passes, got "
            f"{recipe.mixed}; set it to 0, or launch without FSDP"
        )
    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.cpu_ram_efficient_loading = False  # every process has read the weights itself
    return True


def apart(compressor: SoftCompressor) -> SoftCompressor:
    """A copy in which encoder and decoder share no layer's weights, since layers are sharded one by one."""
    made = copy.deepcopy(compressor)
    made.encoder.layers = copy.deepcopy(made.encoder.layers)
    # FSDP does not shard scalars.
    made.converter.scale = nn.Parameter(made.converter.scale.detach().reshape(1))
    return made


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor that may be a shard; a shard is asked for on all processes at once."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def part(full: Tensor, parameter: Tensor) -> Tensor:
    """What this process keeps of `full`, which belongs to `parameter`."""
    whole = full.reshape(parameter.shape).to(parameter.device)
    if not hasattr(parameter, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


@torch.no_grad()
def collect(trained: SoftCompressor, compressor: SoftCompressor) -> None:
    """Give the whole compressor the values of its trained copy; called on all processes."""
    for (_, shard), (_, parameter) in zip(trained.trained(), compressor.trained(), strict=True):
        parameter.copy_(gathered(shard.detach()).reshape(parameter.shape))
