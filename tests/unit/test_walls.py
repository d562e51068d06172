"""What may import what, and what importing costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ctxcompress

PACKAGE = Path(ctxcompress.__file__).parent
ORDER = [
    "errors",
    "files",
    "config",
    "display",
    "types",
    "embedded",
    "words",
    "scores",
    "budgets",
    "pruning",
    "attention",
    "backbone",
    "embedder",
    "calibration",
    "chunking",
    "pooling",
    "selector",
    "soft",
    "card",
    "checkpoint",
    "foreign",
    "prompt",
    "methods.dac",
    "methods.dast",
    "allocators",
    "references",
    "stored",
    "shards",
    "store",
    "indexing",
    "shrink",
    "decoder",
    "remote",
    "pipeline",
    "tasks",
    "vectors",
    "retrieval",
    "train.recipe",
    "train.data",
    "train.lean",
    "train.sharded",
    "train.losses",
    "train.synthesize",
    "train.labels",
    "train.loop",
    "evaluate.metrics",
    "evaluate.signals",
    "evaluate.runner",
    "evaluate.measured",
    "evaluate.runs",
    "evaluate.charts",
    "evaluate.report",
    "evaluate.bench",
    "cli",
    "__main__",
]
"""The data flow: a module imports only modules before it; the oracle `reference` knows none of them."""


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def modules() -> dict[str, Path]:
    found = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")
    }
    return {name: path for name, path in found.items() if not name.endswith("__init__")}


def test_every_module_has_a_place() -> None:
    assert set(modules()) == {*ORDER, "reference"}


@pytest.mark.parametrize("name", ORDER)
def test_modules_import_only_what_comes_before_them(name: str) -> None:
    ours = {
        module.removeprefix("ctxcompress.")
        for module in imports_of(modules()[name])
        if module.startswith("ctxcompress.")
    }
    assert ours <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize("name", ["scores", "budgets", "pruning", "words"])
def test_equations_know_no_models(name: str) -> None:
    assert not {module.split(".")[0] for module in imports_of(modules()[name])} & {
        "transformers",
        "tokenizers",
    }


def test_reference_imports_nothing_of_ours() -> None:
    roots = {module.split(".")[0] for module in imports_of(modules()["reference"])}
    assert not roots & {"ctxcompress", "torch", "transformers", "numpy"}


@pytest.mark.parametrize(
    "package", sorted((PACKAGE.parent / "integrations").glob("*/")), ids=lambda path: path.name
)
def test_integrations_use_only_the_public_names(package: Path) -> None:
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ctxcompress":
                assert node.module == "ctxcompress", path
                assert {alias.name for alias in node.names} <= set(ctxcompress.__all__), path


def test_public_names_exist_and_are_all_listed() -> None:
    assert all(getattr(ctxcompress, name) is not None for name in ctxcompress.__all__)
    assert set(ctxcompress.__all__) == {*ctxcompress._HOMES, "__version__"}
    with pytest.raises(AttributeError):
        ctxcompress.nothing  # noqa: B018


def test_importing_is_light() -> None:
    code = "import sys, json, ctxcompress, ctxcompress.cli; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {
        "torch",
        "transformers",
        "numpy",
        "sentence_transformers",
        "faiss",
        "langchain_core",
        "llama_index",
    }
    assert not heavy & {module.split(".")[0] for module in json.loads(done.stdout)}


def test_extras_named_in_messages_exist() -> None:
    nodes = [
        node for path in modules().values() for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    ]
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    named = {ast.literal_eval(call.args[1]) for call in calls if call.func.id == "MissingExtraError"}
    project = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    extras = project.split("[project.optional-dependencies]")[1].split("[project.scripts]")[0]
    assert named
    assert all(f"\n{extra} = " in extras for extra in named)
