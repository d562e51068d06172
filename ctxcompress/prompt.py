"""Documents and a question -> token ids in the model's chat template, applied exactly once.

Control tokens come from the template only: whatever documents or questions contain is encoded as plain text.
"""

from __future__ import annotations

from collections.abc import Sequence

from ctxcompress.backbone import Backbone

_CONTENT = "<content-8f1d4c02>"
QUESTION = "Question: {query}\nGive a short answer."
QUESTION_ABOUT = "Context:\n{context}\n\nQuestion: {query}\nGive a short answer taken from the context."


def question_prompt(backbone: Backbone, query: str, documents: Sequence[str] = ()) -> list[int]:
    """Token ids of a chat turn that asks `query` about `documents`; empty documents are left out."""
    context = "\n\n".join(text for text in documents if text)
    content = QUESTION_ABOUT.format(context=context, query=query) if context else QUESTION.format(query=query)
    return chat_prompt(backbone, content)


def chat_prompt(backbone: Backbone, content: str) -> list[int]:
    """Token ids of one user turn and the start of the assistant's; plain text if there is no template."""
    tokenizer = backbone.tokenizer
    if not tokenizer.chat_template:
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return [*start, *backbone.encode(content + "\nAnswer:").ids]
    turn = [{"role": "user", "content": _CONTENT}]
    # The template is rendered around a stand-in: its control tokens and the content never
    before, after = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True).split(
        _CONTENT
    )
    head, tail = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
    return [*head, *backbone.encode(content).ids, *tail]
