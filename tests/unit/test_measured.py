"""What an adapter's card takes from evaluation runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ctxcompress import Backbone, InputError, checkpoint
from ctxcompress.cli import app
from ctxcompress.config import SoftConfig
from ctxcompress.evaluate.measured import measured_modes
from ctxcompress.soft import SoftCompressor


def run(ratio: float | None, rows: dict[str, float], task: str = "a") -> dict[str, Any]:
    return {
        "config": {"task_sha256": task, "offset": 0, "limit": 3},
        "rows": [
            {"row": row, "ratio_requested": ratio if ":" in row else None, "accuracy": accuracy}
            for row, accuracy in rows.items()
        ],
    }


def test_best_row_of_each_mode_at_each_ratio() -> None:
    runs = [
        run(8, {"none": 0.1, "full": 0.9, "text:uniform": 0.2, "soft:uniform": 0.5}),
        run(8, {"text:dast": 0.4, "soft:dast": 0.3}),
        run(2.5, {"text:uniform": 0.6, "soft:uniform": 0.7}),
        run(16, {"text:uniform": 0.1}),  # no soft row: nothing to compare
    ]
    assert measured_modes(runs) == {"2.5": {"text": 0.6, "soft": 0.7}, "8": {"text": 0.4, "soft": 0.5}}


def test_runs_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(InputError, match="comparable"):
        measured_modes([run(8, {"text:dast": 0.4}), run(8, {"soft:dast": 0.3}, task="b")])
    with pytest.raises(InputError, match="text row and a soft row"):
        measured_modes([run(8, {"none": 0.1, "text:dast": 0.4})])


def test_command_writes_the_card(backbone: Backbone, tmp_path: Path) -> None:
    compressor = SoftCompressor(backbone, SoftConfig(encoder_layers=1, converter_size=8, encoder_rank=2))
    compressor.finish()
    checkpoint.save(compressor, tmp_path / "adapter")
    (tmp_path / "run").mkdir()
    results = run(4, {"text:uniform": 0.25, "soft:uniform": 0.5})
    (tmp_path / "run" / "results.json").write_text(json.dumps(results), encoding="utf-8")
    outcome = CliRunner().invoke(app, ["card", str(tmp_path / "adapter"), str(tmp_path / "run")])
    assert outcome.exit_code == 0, outcome.stderr
    assert checkpoint.describe(tmp_path / "adapter")["measured"] == {"4": {"text": 0.25, "soft": 0.5}}
    assert "| 4 | 25.0 % | 50.0 % |" in (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
