"""Documents and a question -> token ids in the model's chat template, applied exactly once.

Control tokens come from the template only: whatever documents or questions contain is encoded as plain text.
"""

from __future__ import annotations

from collections.abc import Sequence

from ctxcompress.backbone import Backbone

_CONTENT = "<content-8f1d4c02>"
INSTRUCTION = "Answer the question with a few words."
CONTEXT_INSTRUCTION = "Answer the question with a few words from the documents."


def question_prompt(backbone: Backbone, query: str, documents: Sequence[str] = ()) -> list[int]:
    """Token ids of a chat turn that asks `query` about `documents`; empty documents are left out."""
    present = [text for text in documents if text]
    if not present:
        return chat_prompt(backbone, f"{INSTRUCTION}\n\nQuestion: {query}")
    context = "\n\n".join(present)
    return chat_prompt(backbone, f"Documents:\n\n{context}\n\n{CONTEXT_INSTRUCTION}\n\nQuestion: {query}")


def chat_prompt(backbone: Backbone, content: str) -> list[int]:
    """Token ids of one user turn and the start of the assistant's; plain text for models without a chat template."""
    tokenizer = backbone.tokenizer
    if not tokenizer.chat_template:
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return [*start, *backbone.encode(content + "\nAnswer:").ids]
    turn = [{"role": "user", "content": _CONTENT}]
    # The template is rendered around a stand-in, so its control tokens and the content's characters never meet.
    before, after = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True).split(_CONTENT)
    head, tail = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
    return [*head, *backbone.encode(content).ids, *tail]
