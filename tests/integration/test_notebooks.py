"""The notebooks in `examples/`, run as they stand, on a copy: the committed outputs stay."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_there_are_four() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "choosing_a_budget",
        "langchain_rag",
        "llama_index_rag",
        "serving_with_vllm",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept_and_show_the_budgets(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "%pip install" in first.source
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert any("<caption>" in output.get("data", {}).get("text/html", "") for output in outputs(notebook))
    assert str(Path.home()) not in path.read_text(encoding="utf-8")


@pytest.mark.model
@pytest.mark.usefixtures("embedded", "socket_enabled")
@pytest.mark.filterwarnings("ignore")  # Jupyter's own, about transports and event loops
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "vllm" in path.stem and "CTXCOMPRESS_VLLM_PYTHON" not in os.environ:
        pytest.skip("CTXCOMPRESS_VLLM_PYTHON names no Python with vLLM")
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns(".ctxcompress"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path / "examples"}}
    )
    client.execute()
    assert any("<caption>" in output.get("data", {}).get("text/html", "") for output in outputs(notebook))
