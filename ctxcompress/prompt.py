"""Documents and a question -> segments in the model's chat template, applied exactly once.

A segment is token ids, or whatever stands for a document: soft tokens, or a place to be filled in training.
Control tokens come from the template only: what documents or questions contain is encoded as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

from jinja2 import TemplateError

from ctxcompress.backbone import Backbone, Ids
from ctxcompress.errors import InputError

Soft = TypeVar("Soft")
Turn = tuple[str, Sequence[str | Soft]]
"""Who speaks ("system", "user" or "assistant"), and what: texts and what stands for text, without gaps."""

ROLES = ("system", "user", "assistant")
_STAND_IN = "<content-8f1d4c02-{}>"
_STAND_INS = re.compile(r"<content-8f1d4c02-(\d+)>")
QUESTION = "Question: {query}\nGive a short answer."
NEXT_QUESTION = "Question: {query}\nGive a short answer taken from the context."
QUESTION_ABOUT = ("Context:\n", "\n\n" + NEXT_QUESTION)
REPEAT = "\n\nRepeat the text above."
CONTINUE = "\n\nContinue the text above."
RECALL = 'What follows "{quote}"?'
CLOZE = 'What is missing in "{quote}"?'
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
    return chat_prompt(backbone, question_content(query, documents))


def question_content(query: str, documents: Sequence[Sequence[str | Soft]] = ()) -> list[str | Soft]:
    """What a user says who asks `query` about `documents`, in the words adapters are trained with.

    Args:
        query: the question.
        documents: of each its text, or texts and what stands for text; empty ones are left out.
    """
    present = [document for document in documents if len(document)]
    if not present:
        return [QUESTION.replace("{query}", query)]
    before, after = QUESTION_ABOUT
    return [before, *between(present), after.replace("{query}", query)]


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
    return turns_prompt(backbone, [("user", content)])


def turns_prompt(backbone: Backbone, turns: Sequence[Turn[Soft]]) -> list[Ids | Soft]:
    """Segments of a conversation and the start of the assistant's next turn.

    Args:
        backbone: its tokenizer and template.
        turns: of the conversation so far; their contents reach the model as they are, unless there is no
            template, where questions and answers are told apart by "Answer:".

    Raises:
        InputError: no turns, an unknown role, or a conversation the template cannot show.
    """
    if not turns or not all(role in ROLES for role, _ in turns):
        raise InputError(
            f"a conversation must have turns, each of {', '.join(ROLES)}, got "
            f"{[role for role, _ in turns]}; leave others out"
        )
    if not backbone.tokenizer.chat_template:
        return _merged([_beginning(backbone), *_encoded(backbone, _plain_turns(turns))])
    around = _around(backbone, [role for role, _ in turns])
    segments: list[Ids | Soft] = [around[0]]
    for (_, content), after in zip(turns, around[1:], strict=True):
        segments += [*_encoded(backbone, content), after]
    return _merged(segments)


def follow_up(backbone: Backbone, content: str) -> Ids:
    """Token ids between the end of an answer and the next one: the user asks `content`.

    Raises:
        InputError: there is no chat template, or it does not end answers with the end-of-text token.
    """
    tokenizer = backbone.tokenizer
    turns = ["user", "assistant", "user"]
    _, _, head, tail = _around(backbone, turns) if tokenizer.chat_template else [()] * 4
    if head[:1] != (tokenizer.eos_token_id,):
        raise InputError(
            f"the chat template of {backbone.name} must end answers with the tokenizer's eos_token "
            f"{tokenizer.eos_token!r} to ask again, got {tokenizer.decode(head[:1])!r}; correct the "
            "tokenizer, or set questions_per_sample to 1"
        )
    return (*head[1:], *backbone.encode(content).ids, *tail)


def length(segments: Sequence[Any]) -> int:
    """Tokens, raw and soft, of a prompt."""
    return sum(len(segment) for segment in segments)


def _around(backbone: Backbone, roles: Sequence[str]) -> list[Ids]:
    """Token ids of the template before, between and after the contents of turns."""
    tokenizer = backbone.tokenizer
    # The template is rendered around stand-ins: its control tokens and the contents never mix.
    turns = [{"role": role, "content": _STAND_IN.format(place)} for place, role in enumerate(roles)]
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise InputError(
            f"the chat template of {backbone.name!r} refuses the roles {list(roles)} ({error}); put them in "
            "the order it expects"
        ) from error
    # Odd places hold the numbers of the stand-ins.
    pieces = _STAND_INS.split(rendered)
    if pieces[1::2] != [str(place) for place in range(len(roles))]:
        raise InputError(
            f"the chat template of {backbone.name!r} must show each of the roles {list(roles)} once and in "
            f"order, got them as {pieces[1::2]}; put them in the order it expects"
        )
    return [tuple(tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces[::2]]


def _beginning(backbone: Backbone) -> Ids:
    first = backbone.tokenizer.bos_token_id
    return () if first is None else (first,)


def _plain_turns(turns: Sequence[Turn[Soft]]) -> list[str | Soft]:
    """A conversation as running text, for models without a chat template."""
    shown: list[str | Soft] = []
    for role, content in turns:
        shown += [" " if role == "assistant" else "", *content, "\nAnswer:" if role == "user" else "\n\n"]
    return shown


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
