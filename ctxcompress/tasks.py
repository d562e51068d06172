"""Question-answering tasks on disk: one JSON object a line, plain or xz-compressed.

Schema: `{"id", "question", "answers": [...], "documents": [{"title", "text", "is_gold"}]}`; other keys are
    ignored.
"""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxcompress.errors import InputError
from ctxcompress.files import decoded
from ctxcompress.types import Document


@dataclass(frozen=True, slots=True)
class Question:
    """One question, its accepted answers, and the documents a retriever returned for it.

    Attributes:
        gold: per document, whether it holds the answer.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    documents: tuple[Document, ...]
    gold: tuple[bool, ...]


def read_task(path: Path, *, limit: int | None = None, offset: int = 0) -> list[Question]:
    """Questions number `offset` to `offset + limit` of a task file.

    Raises:
        InputError: unreadable file, a line that does not follow the schema, or no question in that range.
    """
    if (limit is not None and limit < 1) or offset < 0:
        raise InputError(f"limit must be >= 1 and offset >= 0, got {limit} and {offset}")
    stop = None if limit is None else offset + limit
    # Not splitlines: JSON may hold other line separators, such as U+2028, as they are.
    lines = [line for line in _content(path).split("\n") if line.strip()]
    questions = [
        _question(line, number, path) for number, line in enumerate(lines[offset:stop], start=offset + 1)
    ]
    if not questions:
        raise InputError(
            f"{path} has {len(lines)} questions, got offset {offset}, which leaves none; lower the offset"
        )
    return questions


def _content(path: Path) -> str:
    try:
        content = path.read_bytes()
        return decoded(lzma.decompress(content) if path.suffix == ".xz" else content, str(path))
    except (OSError, lzma.LZMAError) as error:
        raise InputError(f"a task file (.jsonl or .jsonl.xz) was expected at {path}, got: {error}") from error


def _question(line: str, number: int, path: Path) -> Question:
    try:
        record: dict[str, Any] = json.loads(line)
        documents = record["documents"]
        return Question(
            id=str(record["id"]),
            question=record["question"],
            answers=tuple(record["answers"]),
            documents=tuple(_document(document, place) for place, document in enumerate(documents)),
            gold=tuple(bool(document.get("is_gold", False)) for document in documents),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"line {number} of {path} must be an object with id, question, answers and documents (title, "
            f"text, is_gold), got {line[:80]!r}: {type(error).__name__} {error}"
        ) from error


def _document(document: dict[str, Any], place: int) -> Document:
    title = document.get("title", "")
    text = f"{title}\n{document['text']}" if title else document["text"]
    return Document(text, id=str(place), metadata={"source": title})
