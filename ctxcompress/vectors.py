"""One door to FAISS: an index that uses the GPU when the installed module can.

All FAISS packages bring the same module `faiss`, so only one can be installed: `ctxcompress[retrieval]` has
the CPU's, `ctxcompress[retrieval-gpu]` the GPU's.
"""

from __future__ import annotations

import functools
from importlib.metadata import packages_distributions
from typing import Any

from ctxcompress.errors import ConfigError, MissingExtraError


def faiss_index(dimension: int, *, gpu: bool | None = None) -> Any:
    """An empty FAISS index of inner products: of vectors of length 1, their cosine similarities.

    For LangChain's `FAISS(index=...)` and LlamaIndex' `FaissVectorStore(faiss_index=...)`.

    Args:
        dimension: of the vectors, >= 1.
        gpu: None uses all GPUs if the module can and there are any; True insists, False does not.

    Raises:
        ConfigError: `gpu=True` without a GPU or with the CPU's FAISS, or two FAISS packages.
        MissingExtraError: FAISS is not installed.
    """
    faiss = import_faiss()
    index = faiss.IndexFlatIP(dimension)
    able = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
    if gpu and not able:
        raise ConfigError(
            "gpu=True needs a FAISS built for GPUs that sees one, got "
            f"{'no GPU' if hasattr(faiss, 'StandardGpuResources') else 'a FAISS for CPUs'}; install "
            '"ctxcompress[retrieval-gpu]" instead of "ctxcompress[retrieval]", or leave gpu=None'
        )
    return faiss.index_cpu_to_all_gpus(index) if able and gpu is not False else index


def on_cpu(index: Any) -> Any:
    """The index in main memory, as FAISS needs it to write a file; one that is there is returned itself."""
    faiss = import_faiss()
    return faiss.index_gpu_to_cpu(index) if "Gpu" in type(index).__name__ else index


@functools.cache
def import_faiss() -> Any:
    """The module `faiss`.

    Raises:
        ConfigError: two packages have installed it over each other.
        MissingExtraError: it is not installed.
    """
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise MissingExtraError("faiss-cpu", "retrieval") from error
    packages = sorted(set(packages_distributions().get("faiss", ())))
    if len(packages) > 1:
        raise ConfigError(
            f"only one package may bring the module faiss, got {', '.join(packages)}, whose files "
            f"overwrite each other; run: pip uninstall -y {' '.join(packages)}, then install one again"
        )
    return faiss
