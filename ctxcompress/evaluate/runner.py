"""Questions x rows -> answers -> figures. A run is a folder that explains itself and can be taken up again.

`config.json` says what made the run, `records.jsonl` has one line per question and row, `results.json` the
figures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ctxcompress.backbone import Backbone
from ctxcompress.config import AllocatorName, one_of
from ctxcompress.decoder import Prompt
from ctxcompress.errors import ConfigError, InputError
from ctxcompress.evaluate.metrics import bootstrap_interval, contains_answer, exact_match, f1
from ctxcompress.evaluate.signals import with_scores
from ctxcompress.files import write_atomically
from ctxcompress.methods.dac import Progress
from ctxcompress.pipeline import ContextCompressor
from ctxcompress.prompt import length, question_prompt
from ctxcompress.tasks import Question
from ctxcompress.types import Document, SoftTokens

PLAIN_ROWS = ("none", "full")
_RowMode = Literal["text", "soft"]
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What a run measures; its hash names the run.

    Args:
        task: name of the task file.
        task_sha256: of its content.
        model: name of the model.
        rows: "none" (no documents), "full" (all of them), or mode:allocator, e.g. "text:dast". If one of them
            is "soft", the decoder wears the adapter in all of them.
        ratio: compression ratio of the compressed rows; this or `budget`.
        budget: their budget in tokens.
        ratio_scale: dial of the rows with `semi_dynamic`, in place of a ratio or budget.
        limit: questions.
        offset: questions left out at the start of the file.
        seed: of the `random` allocator and the bootstrap.
        max_new_tokens: longest answer.
        batch_size: questions answered at once, >= 1. With more, the seconds of an answer are its share of the
            batch's, and answers may differ by the rounding of the model's dtype.
        settings: everything else that changes results: method configurations, calibration, versions.
    """

    task: str
    task_sha256: str
    model: str
    rows: tuple[str, ...]
    ratio: float | None
    budget: int | None
    ratio_scale: float | None = None
    limit: int | None
    offset: int
    seed: int
    max_new_tokens: int
    batch_size: int = 1
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be >= 1, got {self.batch_size}")
        if not self.rows:
            raise ConfigError(
                "rows must name at least one row, got none; for example: none,full,text:uniform,text:dast"
            )
        for row in self.rows:
            if row not in PLAIN_ROWS:
                mode, _, allocator = row.partition(":")
                one_of("the mode of a row (none, full or mode:allocator)", mode, _RowMode)
                one_of("the allocator of a row (mode:allocator)", allocator, AllocatorName)
        dialled = self.ratio_scale is not None
        measured = [
            row for row in self.rows if row not in PLAIN_ROWS and not (dialled and "semi_dynamic" in row)
        ]
        if measured and (self.ratio is None) == (self.budget is None):
            raise ConfigError(f"the rows {measured} need either a ratio or a budget, and not both")

    @property
    def adapted(self) -> bool:
        """Whether the decoder wears the soft-token adapter."""
        return any(row.startswith("soft:") for row in self.rows)

    @property
    def name(self) -> str:
        """Folder name of the run: the task and a hash of everything that makes its numbers."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return f"{self.task.split('.')[0]}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def evaluate(
    compressor: ContextCompressor,
    questions: Sequence[Question],
    config: EvaluationConfig,
    folder: Path,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Answer every question under every row and write the figures; finished work is not done again.

    Args:
        compressor: compresses and answers.
        questions: with unique ids.
        config: describes the run.
        folder: of the run; made if missing.
        progress: told after every answer.

    Returns:
        `config` and `rows`, as in `results.json`.

    Raises:
        InputError: the folder holds a run of another configuration, or two questions have one id.
    """
    if len({question.id for question in questions}) < len(questions):
        raise InputError("question ids must be unique within a task, got one twice; give each its own")
    done = _resumed(folder, config)
    total = len(questions) * len(config.rows)
    with (folder / "records.jsonl").open("a", encoding="utf-8") as records:
        for start in range(0, len(questions), config.batch_size):
            batch = [
                (question, with_scores(compressor, question))
                for question in questions[start : start + config.batch_size]
                if any((question.id, row) not in done for row in config.rows)
            ]
            for row in config.rows:
                unanswered = [asked for asked in batch if (asked[0].id, row) not in done]
                for record in _records(compressor, unanswered, row, config):
                    records.write(json.dumps(record, ensure_ascii=False) + "\n")
                    records.flush()
                    done[record["id"], row] = record
                    if progress is not None:
                        progress("answering", len(done), total)
    wanted = {question.id for question in questions}
    by_row = {
        row: [record for (name, of), record in done.items() if of == row and name in wanted]
        for row in config.rows
    }
    results = {"config": dataclasses.asdict(config), "rows": _figures(by_row, config)}
    write_atomically(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False).encode())
    return results


def read_records(folder: Path) -> list[Record]:
    """One record per question and row of a run."""
    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _resumed(folder: Path, config: EvaluationConfig) -> dict[tuple[str, str], Record]:
    """Records of an earlier, interrupted run; a line that was cut off is dropped from the file."""
    described = json.dumps(dataclasses.asdict(config), indent=1, sort_keys=True)
    config_file, records_file = folder / "config.json", folder / "records.jsonl"
    if config_file.exists() and config_file.read_text(encoding="utf-8") != described:
        raise InputError(
            f"{folder} holds a run of another configuration; choose another --output or remove it"
        )
    if not config_file.exists():
        write_atomically(config_file, described.encode())
    lines = records_file.read_bytes().split(b"\n")[:-1] if records_file.exists() else []
    if lines:
        write_atomically(records_file, b"\n".join(lines) + b"\n")
    records = [json.loads(line) for line in lines]
    return {(record["id"], record["row"]): record for record in records}


def _records(
    compressor: ContextCompressor,
    batch: Sequence[tuple[Question, Sequence[Document]]],
    row: str,
    config: EvaluationConfig,
) -> list[Record]:
    """What `row` makes of questions with their documents, answered at once."""
    asked = [_asked(compressor, question, documents, row, config) for question, documents in batch]
    started = time.perf_counter()
    completions = compressor.decoder(adapted=config.adapted).generate_batch(
        [prompt for prompt, _ in asked], max_new_tokens=config.max_new_tokens
    )
    share = (time.perf_counter() - started) / max(len(asked), 1)
    return [
        {
            "id": question.id,
            "row": row,
            "answer": completion.text,
            "accuracy": contains_answer(completion.text, question.answers),
            "em": exact_match(completion.text, question.answers),
            "f1": f1(completion.text, question.answers),
            **account,
            "seconds": account["seconds"] + share,
        }
        for (question, _), (_, account), completion in zip(batch, asked, completions, strict=True)
    ]


def _asked(
    compressor: ContextCompressor,
    question: Question,
    documents: Sequence[Document],
    row: str,
    config: EvaluationConfig,
) -> tuple[Prompt, Record]:
    """The prompt, and what it took to make it."""
    started = time.perf_counter()
    parts: list[list[str | SoftTokens]] = []
    if row in PLAIN_ROWS:
        parts += [[document.text] for document in documents if document.text and row == "full"]
        account = _plain_account(compressor.backbone, documents, question.gold, row)
    else:
        allocator = one_of("allocator", row.partition(":")[2], AllocatorName)
        scaled = config.ratio_scale is not None and "semi_dynamic" in allocator
        result = compressor.compress(
            documents,
            question.question,
            budget=None if scaled else config.budget,
            compression_ratio=None if scaled else config.ratio,
            ratio_scale=config.ratio_scale if scaled else None,
            mode=one_of("mode", row.partition(":")[0], _RowMode),
            allocator=allocator,
        )
        parts = result.parts()
        pairs = list(zip(result.documents, question.gold, strict=True))
        account = {
            "tokens_before": result.tokens_before,
            "tokens_after": result.tokens_after,
            "gold_tokens": sum(document.tokens_after for document, gold in pairs if gold),
            "gold_first": any(gold and document.rank == 1 for document, gold in pairs),
            "ratios": [chunk.ratio or 0 for document in result.documents for chunk in document.chunks],
        }
    backbone = compressor.backbone
    room = (
        backbone.window - config.max_new_tokens - length(question_prompt(backbone, question.question, ["."]))
    )
    parts, cut = _within(backbone, parts, room)
    return question_prompt(backbone, question.question, parts), {
        **account,
        "documents": len(documents),
        "gold_position": next((place for place, gold in enumerate(question.gold) if gold), None),
        "cut": cut,
        "seconds": time.perf_counter() - started,
    }


def _plain_account(
    backbone: Backbone, documents: Sequence[Document], gold: Sequence[bool], row: str
) -> Record:
    tokens = [backbone.count(document.text) for document in documents]
    kept = tokens if row == "full" else [0] * len(tokens)
    return {
        "tokens_before": sum(tokens),
        "tokens_after": sum(kept),
        "gold_tokens": sum(count for count, is_gold in zip(kept, gold, strict=True) if is_gold),
        "gold_first": None,
    }


def _within(
    backbone: Backbone, parts: list[list[str | SoftTokens]], room: int
) -> tuple[list[list[str | SoftTokens]], bool]:
    """The texts, or beginning and end of their whole when it exceeds the window (LongBench's protocol)."""
    texts = [part for own in parts for part in own if isinstance(part, str)]
    whole = "\n\n".join(texts)
    encoding = backbone.encode(whole)
    if len(texts) < sum(map(len, parts)) or len(encoding.ids) <= room:
        return parts, False
    half = max(room // 2 - 2, 1)
    return [[whole[: encoding.spans[half][0]]], [whole[encoding.spans[-half][0] :]]], True


def _figures(by_row: dict[str, list[Record]], config: EvaluationConfig) -> list[dict[str, Any]]:
    accuracy = {row: _mean(records, "accuracy") for row, records in by_row.items()}
    none, full = accuracy.get("none"), accuracy.get("full")
    figures = []
    for row, records in by_row.items():
        measured = accuracy[row]
        spread = None if none is None or full is None else full - none
        before, after = (
            sum(record[name] for record in records) for name in ("tokens_before", "tokens_after")
        )
        first = [record["gold_first"] for record in records if record["gold_first"] is not None]
        compressed = row not in PLAIN_ROWS
        figures.append(
            {
                "row": row,
                "n": len(records),
                "accuracy": measured,
                "accuracy_ci": list(
                    bootstrap_interval([record["accuracy"] for record in records], config.seed)
                ),
                "em": _mean(records, "em"),
                "f1": _mean(records, "f1"),
                "normalised": (measured - (none or 0.0)) / spread if spread else None,
                "ratio_requested": config.ratio if compressed else None,
                "ratio_achieved": before / after if after else None,
                "tokens_mean": _mean(records, "tokens_after"),
                "seconds_mean": _mean(records, "seconds"),
                "gold_tokens_mean": _mean(records, "gold_tokens"),
                "gold_first": statistics.fmean(first) if first else None,
                "cut": sum(record["cut"] for record in records),
            }
        )
    return figures


def _mean(records: Sequence[Record], name: str) -> float:
    return statistics.fmean(record[name] for record in records)
