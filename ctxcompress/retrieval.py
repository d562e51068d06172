"""A folder of text files -> passages -> a FAISS index on disk -> the passages nearest to a question.

The index lives beside a manifest that records the embedder and a hash of every file; when either changes it
is rebuilt. Files are written under names that hold their content's hash, and the manifest last, so a reader
never sees half an index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxcompress.embedder import Embedder
from ctxcompress.errors import InputError
from ctxcompress.files import read_text, write_atomically
from ctxcompress.types import Document
from ctxcompress.vectors import faiss_index, import_faiss, on_cpu

FORMAT = 1
SUFFIXES = (".md", ".txt")
INDEX_FOLDER = ".ctxcompress"
PASSAGE_WORDS = 120  # MiniLM reads 256 word pieces; English needs about 1.4 of them a word
EMBED_BATCH = 64


@dataclass(frozen=True, slots=True)
class Passage:
    """A run of whole paragraphs (or a piece of a long one) of a file."""

    source: str
    number: int
    text: str

    @property
    def id(self) -> str:
        """File and place in it, for example "nile.md#2"."""
        return f"{self.source}#{self.number}"


class FolderIndex:
    """The passages of a folder and their embeddings.

    Args:
        passages: in the order of the index rows.
        index: a FAISS inner-product index.
        embedder: made the rows, and embeds questions.
    """

    def __init__(self, passages: Sequence[Passage], index: Any, embedder: Embedder) -> None:
        self.passages = passages
        self._index = index
        self.embedder = embedder

    @classmethod
    def open(
        cls,
        folder: Path,
        embedder: Embedder,
        *,
        index_folder: Path | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> FolderIndex:
        """Load the index of `folder`, building it first if there is none or a file has changed.

        Args:
            folder: searched for .md and .txt files, subfolders included, hidden ones not.
            embedder: its name is part of the manifest.
            index_folder: where the index is kept; None is `.ctxcompress` inside `folder`.
            progress: told about embedding: (name, passages done, passages in all).

        Raises:
            InputError: no such folder, no documents in it, an unreadable file, or no place to write the
                index.
        """
        faiss = import_faiss()
        home = index_folder or folder / INDEX_FOLDER
        texts = {str(path.relative_to(folder).as_posix()): read_text(path) for path in _text_files(folder)}
        manifest = _manifest(texts, embedder.name)
        key = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
        rows_file = home / f"{key}.faiss"
        passages = [passage for source, text in texts.items() for passage in split(source, text)]
        if not passages:
            raise InputError(f"{folder} must hold text, got {len(texts)} files that are all empty")
        index = _stored(faiss, home, rows_file, manifest, len(passages))
        if index is None:
            vectors = _embedded(embedder, [passage.text for passage in passages], progress)
            index = faiss_index(vectors.shape[1])
            index.add(vectors)
            _store(faiss, home, rows_file, manifest, index)
        return cls(passages, index, embedder)

    def retrieve(self, query: str, top_k: int) -> list[Document]:
        """The `top_k` passages nearest to the query, nearest first; the score is the cosine similarity.

        Raises:
            InputError: an empty query, or `top_k` below 1.
        """
        if not query.strip():
            raise InputError("retrieval needs a question, got an empty one")
        if top_k < 1:
            raise InputError(f"top_k must be >= 1, got {top_k}")
        scores, rows = self._index.search(self.embedder.embed([query]), min(top_k, len(self.passages)))
        found = ((float(score), self.passages[row]) for score, row in zip(scores[0], rows[0], strict=True))
        return [Document(p.text, id=p.id, score=score, metadata={"source": p.source}) for score, p in found]


def split(source: str, text: str, words: int = PASSAGE_WORDS) -> Iterator[Passage]:
    """Passages of at most `words` words: paragraphs are joined until full, longer ones cut between words.

    The title line of a Markdown file opens each of its passages, because a passage without it may not name
    its subject.
    """
    paragraphs = [
        paragraph.strip() for paragraph in text.replace("\r\n", "\n").split("\n\n") if paragraph.strip()
    ]
    title = ""
    if paragraphs and paragraphs[0].startswith("# ") and "\n" not in paragraphs[0] and len(paragraphs) > 1:
        title = paragraphs.pop(0).removeprefix("# ") + "\n"
    pieces = [piece for paragraph in paragraphs for piece in _pieces(paragraph, words)]
    for number, body in enumerate(_filled(pieces, words)):
        yield Passage(source, number, title + body)


def _pieces(paragraph: str, words: int) -> Iterator[str]:
    found = paragraph.split()
    if len(found) <= words:
        yield paragraph
        return
    for start in range(0, len(found), words):
        yield " ".join(found[start : start + words])


def _filled(pieces: Sequence[str], words: int) -> Iterator[str]:
    waiting: list[str] = []
    length = 0
    for piece in pieces:
        size = len(piece.split())
        if waiting and length + size > words:
            yield "\n\n".join(waiting)
            waiting, length = [], 0
        waiting.append(piece)
        length += size
    if waiting:
        yield "\n\n".join(waiting)


def _text_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(
            f"a folder with .md or .txt files was expected at {folder}, got "
            f"{'a file' if folder.exists() else 'nothing'}"
        )
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    visible = [
        path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not visible:
        raise InputError(f"{folder} must hold .md or .txt files, got none; check the path")
    return visible


def _manifest(texts: dict[str, str], embedder: str) -> dict[str, Any]:
    hashes = {source: hashlib.sha256(text.encode()).hexdigest() for source, text in texts.items()}
    return {"format": FORMAT, "embedder": embedder, "passage_words": PASSAGE_WORDS, "files": hashes}


def _stored(faiss: Any, home: Path, rows_file: Path, manifest: dict[str, Any], rows: int) -> Any | None:
    """The index if manifest and rows are whole and of these files, else None."""
    try:
        if json.loads((home / "manifest.json").read_text(encoding="utf-8")) != {
            **manifest,
            "rows": rows_file.name,
        }:
            return None
        index = faiss.read_index(str(rows_file))
    except (OSError, ValueError, RuntimeError):
        return None  # missing or damaged: it is rebuilt from the files
    return index if index.ntotal == rows else None


def _store(faiss: Any, home: Path, rows_file: Path, manifest: dict[str, Any], index: Any) -> None:
    write_atomically(rows_file, faiss.serialize_index(on_cpu(index)).tobytes())
    content = json.dumps({**manifest, "rows": rows_file.name}, indent=1, ensure_ascii=False)
    write_atomically(home / "manifest.json", content.encode())
    for old in home.glob("*.faiss"):
        if old != rows_file:
            old.unlink(missing_ok=True)


def _embedded(
    embedder: Embedder, texts: Sequence[str], progress: Callable[[str, int, int], None] | None
) -> NDArray[np.float32]:
    blocks = []
    for start in range(0, len(texts), EMBED_BATCH):
        if progress is not None:
            progress("indexing", start, len(texts))
        blocks.append(embedder.embed(texts[start : start + EMBED_BATCH]))
    if progress is not None:
        progress("indexing", len(texts), len(texts))
    return np.concatenate(blocks)
