"""Index time and query time on the command line: index, ask with a store, bench, evaluate with a report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ctxcompress import Backbone, SoftTokenStore, checkpoint
from ctxcompress.cli import app
from ctxcompress.config import SoftConfig
from ctxcompress.evaluate.bench import bench_queries
from ctxcompress.pipeline import ContextCompressor
from ctxcompress.soft import SoftCompressor

NOTES = {
    "rome.md": "# Rome\n\nRome is the capital of Italy.\n\nIt lies on the Tiber.",
    "owls.txt": "Owls fly at night. They hunt mice and voles.",
}
WORDS = ("red", "blue", "Rome", "Tiber", "owl", "mice")


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = Backbone.from_pretrained(tiny_model, device="cpu")
    torch.manual_seed(0)
    config = SoftConfig(ratio_set=(2, 4, 8), window=128, encoder_layers=2, converter_size=32, encoder_rank=4)
    compressor = SoftCompressor(base, config)
    compressor.finish()
    folder = tmp_path_factory.mktemp("adapter")
    checkpoint.save(compressor, folder)
    return folder


def ran(*command: object) -> Any:
    outcome = CliRunner().invoke(app, [*map(str, command), "--json"])
    assert outcome.exit_code == 0, outcome.stderr
    return json.loads(outcome.stdout)


@pytest.mark.model
def test_a_folder_is_encoded_once(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    for name, text in NOTES.items():
        (folder / name).write_text(text, encoding="utf-8")
    model = ("--model", tiny_model, "--adapter", adapter)
    first = ran("index", folder, *model, "--nll")
    assert first["encoded"] == first["passages"] == 2
    assert ran("index", folder, *model)["encoded"] == 0
    with SoftTokenStore(first["store"], readonly=True) as store:
        assert len(store) == 2
        assert all(entry.tokens for entry in store.entries())
    answer = ran(
        "ask", folder, "Where is Rome?", *model, "--mode", "soft", "--ratio", 4, "--max-new-tokens", 3
    )
    assert answer["mode"] == "soft"
    with SoftTokenStore(first["store"], readonly=True) as store:
        assert len(store) == 2  # nothing was encoded for the question
    (folder / "new.txt").write_text("A new note about nothing much.", encoding="utf-8")
    assert ran("index", folder, *model)["encoded"] == 1


def test_the_benchmark_has_all_rows(tiny_model: Path, adapter: Path) -> None:
    measured = ran(
        *("bench", "query", "--documents", "2,3", "--tokens", 24, "--repetitions", 2),
        *("--model", tiny_model, "--adapter", adapter),
    )
    assert [row["documents"] for row in measured["rows"]] == [2, 3]
    for row in measured["rows"]:
        assert row["tokens"] == 24 * row["documents"]
        assert 0 < row["soft_tokens"] <= 3 * row["documents"]
        for name in ("full", "uniform", "dast", "dast_own"):
            assert row[f"seconds_{name}"] > 0
        assert row["seconds_dast_own"] < row["seconds_dast"]
        assert row["sooner_dast"] == pytest.approx(row["seconds_full"] / row["seconds_dast"])


def test_the_benchmark_encodes_before_the_clock_starts(
    tiny_model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressor = ContextCompressor.from_pretrained(tiny_model, device="cpu", adapter=adapter)
    encoded: list[int] = []
    encode = compressor.soft.encode
    monkeypatch.setattr(
        compressor.soft,
        "encode",
        lambda texts, ratio=None: encoded.append(len(texts)) or encode(texts, ratio),
    )
    bench_queries(compressor, [3], tokens=24, repetitions=2)
    assert encoded == [3]


@pytest.mark.parametrize("documents", ["", "many", "0"])
def test_the_benchmark_wants_numbers(tiny_model: Path, adapter: Path, documents: str) -> None:
    command = [
        "bench",
        "query",
        "--documents",
        documents,
        "--model",
        str(tiny_model),
        "--adapter",
        str(adapter),
    ]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 1
    assert "numbers like 10,40" in outcome.stderr


def test_an_evaluation_makes_a_page(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    documents = [
        {"title": "t", "text": text, "is_gold": not place} for place, text in enumerate(NOTES.values())
    ]
    record = {"id": "1", "question": "Where is Rome?", "answers": ["Italy"], "documents": documents}
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps(record) + "\n", encoding="utf-8")
    rows = "full,soft:uniform,soft:dast,soft:semi_dynamic"
    command = ("evaluate", "--task", task, "--rows", rows, "--model", tiny_model, "--adapter", adapter)
    settings = ("--max-new-tokens", 3, "--report", tmp_path / "report", "--prior", "none")
    for name, ratio in (("four", 4), ("two", 2)):
        results = ran(*command, *settings, "--ratio", ratio, "--output", tmp_path / name)
        assert [row["row"] for row in results["rows"]] == rows.split(",")
    scaled = ran(
        *(*command[:3], "--rows", "soft:semi_dynamic", *command[5:], *settings),
        *("--ratio-scale", 1, "--output", tmp_path / "scale"),
    )
    assert scaled["config"]["ratio_scale"] == 1
    records = [json.loads(line) for line in (tmp_path / "four/records.jsonl").read_text().splitlines()]
    assert [len(record.get("ratios", [])) for record in records] == [0, 2, 2, 2]
    assert {record["gold_position"] for record in records} == {0}
    page = (tmp_path / "report/index.html").read_text(encoding="utf-8")
    assert page.count("soft:semi_dynamic") > 1
    assert len(list((tmp_path / "report/runs").glob("*.json"))) == 3


def test_heads_are_calibrated_on_soft_tokens_and_used(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    words = ["river", "castle", "engine", "violin", "planet", "harbour", "forest", "desert", "island"]
    words += ["bridge", "tower", "valley"]
    records = [
        {
            "id": str(place),
            "question": f"Where is the {word}?",
            "answers": ["north"],
            "documents": [
                {"title": other, "text": f"The {other} is in the north.", "is_gold": other == word}
                for other in words[:4] + [word] * (word not in words[:4])
            ],
        }
        for place, word in enumerate(words)
    ]
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    own = tmp_path / "adapter"
    shutil.copytree(adapter, own)
    command = ("calibrate", "--task", task, "--model", tiny_model, "--adapter", own)
    soft = ran(*command, "--mode", "soft", "--output", own / "calibration.json")
    text = ran(*command, "--output", tmp_path / "text.json")
    assert (soft["mode"], text["mode"]) == ("soft", "text")
    assert soft["held_out_loss_by_heads"] != text["held_out_loss_by_heads"]
    compressor = ContextCompressor.from_pretrained(tiny_model, device="cpu", adapter=own)
    assert [list(head) for head in compressor.soft_dast.calibration.heads] == soft["heads"]
    assert compressor.dast.calibration != compressor.soft_dast.calibration


def test_a_fitted_ratio_head_is_in_the_card(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    own = tmp_path / "adapter"
    # In another dtype than this machine's, which must not become the files'.
    base = Backbone.from_pretrained(tiny_model, device="cpu")
    other = torch.float32 if base.model.dtype == torch.bfloat16 else torch.bfloat16
    checkpoint.save(checkpoint.load(base, adapter), own, dtype=other)
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": f"{word} {other} " * 4}) + "\n" for word in WORDS for other in WORDS[:2]),
        encoding="utf-8",
    )
    command = ("fit-ratio-head", own, texts, "--model", tiny_model, "--tokens", 8, "--tolerance", 0.25)
    figures = ran(*command, "--notice", "Words, CC0.")
    described, card = checkpoint.describe(own), (own / "README.md").read_text(encoding="utf-8")
    assert figures["texts"] == 2 * len(WORDS)
    assert described["ratio_head"]["r2"] == figures["r2"]
    assert described["fingerprint"] != checkpoint.describe(adapter)["fingerprint"]
    for line in ("fitted to 12 texts", "repeating 8 tokens", "0.25 nats", "R2 ", "data: Words, CC0."):
        assert line in card
    checkpoint.load(base, own)
    assert checkpoint.stored_dtype(own) == other
    # A teacher's word goes before the adapter's own losses.
    told = [{"text": f"{word} {count}", "log2_ratio": count} for count in (1, 2, 3) for word in WORDS]
    texts.write_text("".join(json.dumps(record) + "\n" for record in told), encoding="utf-8")
    ran("fit-ratio-head", own, texts, "--model", tiny_model)
    assert "labels: a teacher's" in (own / "README.md").read_text(encoding="utf-8")
