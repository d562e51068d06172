"""LangChain's FAISS vector store on disk without pickle: FAISS's own file, and a line of JSON per document.

`FAISS.save_local` pickles documents, and loading a pickle runs whatever it says. This keeps what is needed.
"""

from __future__ import annotations

import json
from pathlib import Path

import faiss
from langchain_community.docstore.in_memory import InMemoryDocstore
from langchain_community.vectorstores import FAISS
from langchain_community.vectorstores.utils import DistanceStrategy
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings


def empty(index: faiss.Index, embedding: Embeddings) -> FAISS:
    """A vector store around an index of inner products, such as `ctxcompress.faiss_index(384)`."""
    return FAISS(
        embedding, index, InMemoryDocstore(), {}, distance_strategy=DistanceStrategy.MAX_INNER_PRODUCT
    )


def save(vectors: FAISS, folder: Path) -> None:
    """Write vectors and documents; metadata must be JSON.

    Args:
        vectors: the store; its index may be on a GPU.
        folder: made if missing.
    """
    index = vectors.index
    folder.mkdir(parents=True, exist_ok=True)
    on_cpu = faiss.index_gpu_to_cpu(index) if "Gpu" in type(index).__name__ else index
    faiss.write_index(on_cpu, str(folder / "vectors.faiss"))
    with (folder / "documents.jsonl").open("w", encoding="utf-8") as file:
        for row in range(index.ntotal):
            name = vectors.index_to_docstore_id[row]
            document = vectors.docstore.search(name)
            line = {"id": name, "page_content": document.page_content, "metadata": document.metadata}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def load(folder: Path, embedding: Embeddings) -> FAISS:
    """Read what `save` wrote.

    Args:
        folder: the folder.
        embedding: the one the documents were embedded with.
    """
    vectors = empty(faiss.read_index(str(folder / "vectors.faiss")), embedding)
    with (folder / "documents.jsonl").open(encoding="utf-8") as file:
        documents = [Document(**json.loads(line)) for line in file]
    vectors.docstore.add({document.id: document for document in documents})
    vectors.index_to_docstore_id.update(enumerate(document.id for document in documents))
    return vectors
