"""Documents and a question -> segments in the model's chat template, applied exactly once.

A segment is token ids, or whatever stands for a document: soft tokens, or a place to be filled in training.
Control tokens come from the template only: what documents or questions contain is encoded as plain text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from ctxcompress.backbone import Backbone, Ids

Soft = TypeVar("Soft")

_CONTENT = "<content-8f1d4c02>"
QUESTION = "Question: {query}\nGive a short answer."
NEXT_QUESTION = "Question: {query}\nGive a short answer taken from the context."
QUESTION_ABOUT = ("Context:\n", "\n\n" + NEXT_QUESTION)
REPEAT = "\n\nRepeat the text above."
CONTINUE = "\n\nContinue the text above."
BETWEEN = "\n\n"


def question_prompt(
    backbone: Backbone, query: str, documents: Sequence[Sequence[str | Soft]] = ()
) -> list[Ids | Soft]:
    """Segments of a chat turn that asks `query` about `documents`; empty documents are left out.

    Args:
        backbone: its tokenizer and template.
        query: the question.
        documents: of each its text, or texts and what stands for text, which follow each other without a gap.
    """
    present = [document for document in documents if len(document)]
    if not present:
        return chat_prompt(backbone, [QUESTION.replace("{query}", query)])
    before, after = QUESTION_ABOUT
    return chat_prompt(backbone, [before, *between(present), after.replace("{query}", query)])


def around_documents(backbone: Backbone, query: str) -> tuple[Ids, Ids]:
    """Token ids of `question_prompt` before the first document, and after the last and a blank line."""
    documents: Any = object()
    parts: list[Any] = chat_prompt(
        backbone, [QUESTION_ABOUT[0], documents, NEXT_QUESTION.replace("{query}", query)]
    )
    head, _, tail = parts
    return head, tail


def between(documents: Sequence[Sequence[str | Soft]]) -> list[str | Soft]:
    """The parts of all documents, with a blank line between neighbouring documents."""
    return [part for document in documents for part in (BETWEEN, *document)][1:]


def chat_prompt(backbone: Backbone, content: Sequence[str | Soft]) -> list[Ids | Soft]:
    """Segments of one user turn and the start of the assistant's; plain text if there is no template."""
    tokenizer = backbone.tokenizer
    if not tokenizer.chat_template:
        head = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
        return _merged([head, *_encoded(backbone, [*content, "\nAnswer:"])])
    turn = [{"role": "user", "content": _CONTENT}]
    # The template is rendered around a stand-in: its control tokens and the content never mix.
    rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    head, tail = (
        tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in rendered.split(_CONTENT)
    )
    return _merged([head, *_encoded(backbone, content), tail])


def follow_up(backbone: Backbone, content: str) -> Ids | None:
    """Token ids between the end of an answer and the next one: the user asks `content`.

    None if the template does not end answers with the end-of-text token, or there is no template.
    """
    tokenizer = backbone.tokenizer
    if not tokenizer.chat_template:
        return None
    turns = [{"role": role, "content": _CONTENT} for role in ("user", "assistant", "user")]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    _, _, before, after = rendered.split(_CONTENT)
    head, tail = (tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (before, after))
    if head[:1] != (tokenizer.eos_token_id,):
        return None
    return (*head[1:], *backbone.encode(content).ids, *tail)


def length(segments: Sequence[Any]) -> int:
    """Tokens, raw and soft, of a prompt."""
    return sum(len(segment) for segment in segments)


def _encoded(backbone: Backbone, content: Sequence[str | Soft]) -> list[Ids | Soft]:
    """Token ids for strings, neighbours encoded as one; the rest unchanged."""
    joined: list[str | Soft] = []
    for part in content:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return [backbone.encode(part).ids if isinstance(part, str) else part for part in joined]


def _merged(segments: Sequence[Ids | Soft]) -> list[Ids | Soft]:
    """Neighbouring token ids as one segment, so that equal prompts look equal."""
    merged: list[Ids | Soft] = []
    for segment in segments:
        if isinstance(segment, tuple) and merged and isinstance(merged[-1], tuple):
            merged[-1] = (*merged[-1], *segment)
        else:
            merged.append(segment)
    return merged
