"""Prompt -> answer with a model in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ctxcompress.backbone import Backbone
from ctxcompress.errors import InputError
from ctxcompress.prompt import Ids, length, splice
from ctxcompress.types import SoftTokens


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
    def generate(self, prompt: Sequence[Ids | SoftTokens], *, max_new_tokens: int = 64) -> Completion:
        """Continue `prompt` until the model ends its turn.

        Raises:
            InputError: the prompt and the answer together exceed the model's window.
        """
        window, tokens = self._backbone.window, length(prompt)
        if tokens + max_new_tokens > window:
            raise InputError(
                f"prompt and answer must fit the model's window of {window} tokens, got {tokens} + "
                f"{max_new_tokens}; lower the budget or max_new_tokens"
            )
        filled = [part.embeddings_MD if isinstance(part, SoftTokens) else part for part in prompt]
        embeds_1TD = splice(filled, self._backbone.model.get_input_embeddings())[None]
        output = self._backbone.model.generate(
            inputs_embeds=embeds_1TD,
            attention_mask=torch.ones(embeds_1TD.shape[:2], dtype=torch.long, device=embeds_1TD.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        text = self._backbone.tokenizer.decode(output[0], skip_special_tokens=True).strip()
        return Completion(text, tokens, len(output[0]))
