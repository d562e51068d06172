"""What an adapter's card takes from evaluation runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ctxcompress import Backbone, InputError, checkpoint
from ctxcompress.cli import app
from ctxcompress.config import SoftConfig
from ctxcompress.evaluate.measured import measured_modes, measured_rows
from ctxcompress.soft import SoftCompressor


def run(
    ratio: float | None,
    rows: dict[str, float],
    task: str = "a.jsonl",
    adapter: str | None = "mine",
    chunk_tokens: int = 64,
) -> dict[str, Any]:
    settings = {"adapter": adapter, "chunk_tokens": chunk_tokens, "dtype": "torch.float32"}
    asked = {"task": task, "offset": 20, "limit": 4, "max_new_tokens": 16, "ratio": ratio}
    return {
        "config": asked | {"settings": settings},
        "rows": [
            {
                "row": row,
                "ratio_requested": ratio if ":" in row else None,
                "n": 4,
                "accuracy": accuracy,
                "accuracy_ci": [accuracy / 2, (1 + accuracy) / 2],
                "f1": accuracy / 4,
                "tokens_mean": 1200.0,
            }
            for row, accuracy in rows.items()
        ],
    }


def test_best_row_of_each_mode_at_each_ratio() -> None:
    runs = [
        run(8, {"none": 0.1, "full": 0.9, "text:uniform": 0.25, "soft:uniform": 0.5}),
        run(8, {"text:bm25": 0.5, "soft:bm25": 0.5, "text:dast": 0.75, "soft:dast": 0.25}, task="b.jsonl"),
        run(2.5, {"text:uniform": 0.6, "soft:uniform": 0.7}),
        run(16, {"text:uniform": 0.1}),  # no soft row: nothing to compare
        run(None, {"text:uniform": 0.1, "soft:uniform": 0.2}),  # to a budget: no ratio
    ]
    assert measured_modes(runs) == {"2.5": {"text": 0.6, "soft": 0.7}, "8": {"text": 0.5, "soft": 0.5}}


def test_an_allocator_of_one_mode_decides_nothing() -> None:
    rows = {"text:uniform": 0.3, "soft:uniform": 0.2, "soft:dast": 0.9, "text:bm25": 0.8}
    assert measured_modes([run(4, rows)]) == {"4": {"text": 0.3, "soft": 0.2}}


def test_runs_without_both_modes_are_refused() -> None:
    with pytest.raises(InputError, match="text row and a soft row of one allocator"):
        measured_modes([run(8, {"text:uniform": 0.4, "soft:dast": 0.3}), run(8, {"none": 0.1})])


def test_tables_of_all_rows() -> None:
    first, other = measured_rows(
        [
            run(8, {"text:uniform": 0.2, "soft:uniform": 0.5}),
            run(4, {"none": 0.1, "full": 0.9, "soft:uniform": 0.7}),
            run(4, {"none": 0.1, "soft:uniform": 0.6}, chunk_tokens=256),
        ],
        "mine",
    )
    assert {name: first[name] for name in ("task", "offset", "limit", "max_new_tokens", "chunk_tokens")} == {
        "task": "a.jsonl",
        "offset": 20,
        "limit": 4,
        "max_new_tokens": 16,
        "chunk_tokens": 64,
    }
    assert [(row["row"], row["ratio"]) for row in first["rows"]] == [
        ("none", None),
        ("full", None),
        ("soft:uniform", 4),
        ("text:uniform", 8),
        ("soft:uniform", 8),
    ]
    # (0.7 - 0.1) / (0.9 - 0.1) and so on; none is the zero, full the one.
    assert [row["normalised"] for row in first["rows"]] == pytest.approx([0, 1, 0.75, 0.125, 0.5])
    assert first["rows"][2]["tokens"] == 1200
    assert [(row["row"], row["normalised"]) for row in other["rows"]] == [
        ("none", None),
        ("soft:uniform", None),
    ]


@pytest.mark.parametrize("adapter", ["another", None])
def test_runs_of_another_adapter_are_refused(adapter: str | None) -> None:
    with pytest.raises(InputError, match=f"this adapter, mine, got one that measured {adapter or 'none'}"):
        measured_rows([run(4, {"text:uniform": 0.1, "soft:uniform": 0.2}, adapter=adapter)], "mine")


def test_command_writes_the_card(backbone: Backbone, tmp_path: Path) -> None:
    compressor = SoftCompressor(backbone, SoftConfig(encoder_layers=1, converter_size=8, encoder_rank=2))
    compressor.finish()
    folder = tmp_path / "adapter"
    checkpoint.save(compressor, folder)
    (tmp_path / "run").mkdir()
    rows = {"none": 0.0, "full": 1.0, "text:uniform": 0.25, "soft:uniform": 0.5}

    def command(adapter: str) -> Result:
        content = json.dumps(run(4, rows, adapter=adapter))
        (tmp_path / "run" / "results.json").write_text(content, encoding="utf-8")
        return CliRunner().invoke(app, ["card", str(folder), str(tmp_path / "run")])

    before = (folder / "README.md").read_bytes()
    refused = command("another")
    assert refused.exit_code == 1
    assert "this adapter" in refused.stderr
    assert (folder / "README.md").read_bytes() == before
    outcome = command(compressor.fingerprint)
    assert outcome.exit_code == 0, outcome.stderr
    assert checkpoint.describe(folder)["measured"] == {"4": {"text": 0.25, "soft": 0.5}}
    card = (folder / "README.md").read_text(encoding="utf-8")
    for line in (
        "`a.jsonl` from question 21 on, answers of at most 16 tokens, chunks of at most 64, float32:",
        "| none |  | 4 | 0.0 % [0.0, 50.0] | 0.0 | 0.00 | 1,200 |",
        "| soft:uniform | 4 | 4 | 50.0 % [25.0, 75.0] | 12.5 | 0.50 | 1,200 |",
        "| 4 | 25.0 % | 50.0 % |",
    ):
        assert line in card
