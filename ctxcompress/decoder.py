"""Prompt -> answer with a model in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ctxcompress.backbone import Backbone
from ctxcompress.errors import InputError


@dataclass(frozen=True, slots=True)
class Completion:
    """What a decoder returned, and what it cost in tokens."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class LocalDecoder:
    """Greedy decoding with a backbone's own model: no second copy of the weights.

    Args:
        backbone: the model.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], *, max_new_tokens: int = 64) -> Completion:
        """Continue `prompt` until the model ends its turn.

        Raises:
            InputError: the prompt and the answer together exceed the model's window.
        """
        window = self._backbone.window
        if len(prompt) + max_new_tokens > window:
            raise InputError(
                f"prompt and answer must fit the model's window of {window} tokens, got {len(prompt)} + "
                f"{max_new_tokens}; lower the budget or max_new_tokens"
            )
        ids = torch.tensor([list(prompt)], device=self._backbone.device)
        output = self._backbone.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
        )
        new = output[0, len(prompt) :]
        text = self._backbone.tokenizer.decode(new, skip_special_tokens=True).strip()
        return Completion(text, len(prompt), len(new))
