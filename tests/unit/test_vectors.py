"""One function for FAISS indexes, on whatever the installed module can."""

from __future__ import annotations

import types
from pathlib import Path

import faiss
import numpy as np
import pytest

from ctxcompress import ConfigError, faiss_index
from ctxcompress import vectors as module

ROWS = np.eye(3, dtype=np.float32)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    module.import_faiss.cache_clear()


def test_an_index_finds_by_inner_product_and_survives_a_file(tmp_path: Path) -> None:
    index = faiss_index(3)
    index.add(ROWS)
    faiss.write_index(module.on_cpu(index), str(tmp_path / "index"))
    scores, rows = faiss.read_index(str(tmp_path / "index")).search(ROWS[1:2], 1)
    assert (scores.tolist(), rows.tolist()) == ([[1.0]], [[1]])


def test_insisting_on_a_gpu_without_one_is_refused() -> None:
    assert not hasattr(faiss, "StandardGpuResources")
    with pytest.raises(ConfigError, match=r"retrieval-gpu"):
        faiss_index(3, gpu=True)
    assert faiss_index(3, gpu=False).ntotal == 0


def test_the_gpu_is_used_when_the_module_can(monkeypatch: pytest.MonkeyPatch) -> None:
    # No GPU's module here: one that has its names, and tells which was called.
    able = types.SimpleNamespace(
        IndexFlatIP=faiss.IndexFlatIP,
        StandardGpuResources=object,
        get_num_gpus=lambda: 1,
        index_cpu_to_all_gpus=lambda index: ("gpu", index.d),
    )
    monkeypatch.setattr(module, "import_faiss", lambda: able)
    assert faiss_index(3) == faiss_index(3, gpu=True) == ("gpu", 3)
    assert isinstance(faiss_index(3, gpu=False), faiss.IndexFlatIP)
    able.get_num_gpus = lambda: 0
    assert isinstance(faiss_index(3), faiss.IndexFlatIP)


def test_two_packages_that_overwrite_each_other_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"faiss": ["faiss-gpu", "faiss-cpu", "faiss-cpu"]}
    monkeypatch.setattr(module, "packages_distributions", lambda: both)
    with pytest.raises(ConfigError, match=r"pip uninstall -y faiss-cpu faiss-gpu"):
        faiss_index(3)
