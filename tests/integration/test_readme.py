"""What the README shows, run as it stands."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from ctxcompress.backbone import native_dtype

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.model
@pytest.mark.usefixtures("embedded")
def test_first_example_prints_what_its_comments_say() -> None:
    code = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert code
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code[1], "README.md", "exec"), {})
    lines = printed.getvalue().splitlines()
    assert "three hearts" in lines[-1]
    if native_dtype(torch.device("cpu")) == torch.bfloat16:  # other dtypes may choose other words
        assert lines == re.findall(r"^# (.*)$", code[1], flags=re.MULTILINE)


def test_every_file_it_names_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links
    assert all((ROOT / link).exists() for link in links)
    tree = README.split("## Files, in reading order")[1].split("```")[1]
    named = re.findall(r"(?:^|\s)([a-z]+\.py)\b", tree)
    assert all(list((ROOT / "ctxcompress").rglob(name)) for name in named), named
    assert {path.name for path in (ROOT / "ctxcompress").glob("[a-z]*.py")} - set(named) <= {
        "errors.py",
        "files.py",
    }


@pytest.mark.parametrize(
    ("heading", "package"),
    [
        ("LangChain", "langchain-ctxcompress"),
        ("LlamaIndex", "llama-index-postprocessor-ctxcompress"),
    ],
)
def test_frameworks_are_shown_as_their_own_tests_run_them(heading: str, package: str) -> None:
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```(?:python|diff)\n.*?```", section, flags=re.DOTALL)
    tested = (ROOT / "integrations" / package / "README.md").read_text(encoding="utf-8")
    assert len(blocks) >= 2
    assert all(block in tested for block in blocks)
