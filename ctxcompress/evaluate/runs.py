"""Runs of `evaluate` as a report keeps them: files of settings, rows and records -> rows to compare.

Runs are compared only if they agree in everything but what is swept on purpose (rows, ratio or budget, DAST's
settings, the ratio scale); runs that agree so are a group.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from ctxcompress.config import DASTConfig, to_dict
from ctxcompress.errors import InputError
from ctxcompress.evaluate.runner import PLAIN_ROWS, EvaluationConfig, Record
from ctxcompress.files import read_text, write_atomically

DEFAULT_ALPHA = 0.5
_SWEPT = regex.compile(r"rows|ratio|budget|ratio_scale|settings\.dast(\..*)?")
_OPTIONS: tuple[tuple[str, str, object], ...] = (
    ("ratio", "--ratio", None),
    ("budget", "--budget", None),
    ("ratio_scale", "--ratio-scale", None),
    ("limit", "--limit", None),
    ("offset", "--offset", 0),
    ("seed", "--seed", 0),
    ("max_new_tokens", "--max-new-tokens", 32),
    ("model", "--model", "embedded"),
    ("settings.embedder", "--embedder", "embedded"),
    ("settings.dast.prior", "--prior", "retriever"),
    ("settings.dast.mode", "--dast-mode", "repaired"),
    ("settings.dast.alpha", "--alpha", DEFAULT_ALPHA),
    ("settings.dast.ppl_sign", "--ppl-sign", -1),
)
"""(path in the configuration, option, default) of what a command line says beside task and rows."""

_Number = float | None


@dataclass(frozen=True, slots=True)
class Answered:
    """What one question's record says."""

    right: float
    gold_position: int | None
    gold_tokens: float
    ratios: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RunRow:
    """One row of one run.

    Attributes:
        group: of the run; rows of different groups are never compared.
        mode: "text" or "soft"; "" for `none` and `full`.
        allocator: the row's other half, or "none" or "full".
        label: the allocator, with what its settings have beside the defaults.
        asked: ("ratio" or "budget" or "scale", value); ("", 0) if nothing.
        dast: settings of a row that DAST weighs.
        accuracy: mean and both ends of its interval.
        answers: by question.
    """

    group: str
    mode: str
    allocator: str
    label: str
    asked: tuple[str, float]
    dast: Mapping[str, Any]
    seed: int
    n: int
    accuracy: tuple[float, float, float]
    normalised: _Number
    ratio: _Number
    tokens: float
    seconds: float
    answers: Mapping[str, Answered]

    @property
    def name(self) -> str:
        """Mode and label."""
        return f"{self.mode}:{self.label}" if self.mode else self.label

    @property
    def target(self) -> str:
        """What was asked, in words."""
        kind, value = self.asked
        texts = {"ratio": f"{value:g}x", "budget": f"{value:g} tokens", "scale": f"scale {value:+g}"}
        return texts.get(kind, "")


@dataclass(frozen=True, slots=True)
class Run:
    """One run: its settings, the command that repeats it, and its rows."""

    name: str
    command: str
    model: str
    config: Mapping[str, Any]
    group: str
    rows: list[RunRow]


def add_run(report: Path, results: dict[str, Any], records: Sequence[Record]) -> None:
    """Keep a copy of a run in the report's folder; the same run replaces its older copy.

    Args:
        report: folder of the report; made if missing.
        results: what `evaluate` returned, or `results.json`.
        records: its records. `gold_position` (from 0) and `ratios` fill their sections if present.

    Raises:
        InputError: not the results of a run, or the folder cannot be written to.
    """
    try:
        content: dict[str, Any] = {**results, "records": list(records)}
        name = EvaluationConfig(**{**content["config"], "rows": tuple(content["config"]["rows"])}).name
        _run(name, content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"results must be what evaluate returned (config and rows) and records its lines, got: {error!r}"
        ) from error
    # A task name is the user's; a file name must stay in this folder.
    path = report / "runs" / (regex.sub(r"[^\w.-]|^\.", "_", name) + ".json")
    write_atomically(path, json.dumps(content, sort_keys=True).encode())


def read_runs(report: Path) -> list[Run]:
    """All runs in the report's folder, by name.

    Raises:
        InputError: none, or a file among them that is none.
    """
    files = sorted((report / "runs").glob("*.json"))
    if not files:
        raise InputError(
            f"{report / 'runs'} must hold at least one run, got none; add one with: "
            "ctxcompress evaluate --task TASK --ratio 4 --report FOLDER"
        )
    runs = []
    for file in files:
        text = read_text(file)
        try:
            runs.append(_run(file.stem, json.loads(text)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{file} must be a run that add_run wrote, got: {error!r}; remove it and evaluate again"
            ) from error
    return runs


def _run(name: str, content: Any) -> Run:
    config: dict[str, Any] = content["config"]
    answers: dict[str, dict[str, Answered]] = {}
    for record in content["records"]:
        answers.setdefault(record["row"], {})[str(record["id"])] = _answer(record)
    group = hashlib.sha256(json.dumps(_comparable(config), sort_keys=True).encode()).hexdigest()[:8]
    rows = [_row(figures, config, group, answers.get(figures["row"], {})) for figures in content["rows"]]
    return Run(name, _command(config), str(config["model"]), config, group, rows)


def _answer(record: Record) -> Answered:
    position = record.get("gold_position")
    return Answered(
        right=_number(record["accuracy"]),
        gold_position=None if position is None else int(_number(position)),
        gold_tokens=_number(record.get("gold_tokens", 0)),
        ratios=tuple(_number(ratio) for ratio in record.get("ratios", ())),
    )


def _row(
    figures: Mapping[str, Any], config: Mapping[str, Any], group: str, answers: Mapping[str, Answered]
) -> RunRow:
    first, _, second = figures["row"].partition(":")
    plain = figures["row"] in PLAIN_ROWS
    mode, allocator = ("", first) if plain else (first, second)
    settings = config["settings"]
    weighs = allocator.split("+")
    dast = settings.get("dast", {}) if "dast" in weighs else {}
    low, high = figures["accuracy_ci"]
    return RunRow(
        group=group,
        mode=mode,
        allocator=allocator,
        label=", ".join([" ".join([allocator, *kind_of(dast)]), *beside_defaults(dast)]),
        asked=("", 0.0) if plain else _asked(config, "semi_dynamic" in weighs),
        dast=dast,
        seed=int(_number(config["seed"])),
        n=int(_number(figures["n"])),
        accuracy=(_number(figures["accuracy"]), _number(low), _number(high)),
        normalised=_optional(figures["normalised"]),
        ratio=_positive(figures["ratio_achieved"]),
        tokens=_number(figures["tokens_mean"]),
        seconds=_number(figures["seconds_mean"]),
        answers=answers,
    )


def _asked(config: Mapping[str, Any], dialled: bool) -> tuple[str, float]:
    """What a compressed row was to meet; one that chooses its own ratios follows the dial if there is one."""
    for name, kind in (("ratio_scale", "scale"), ("ratio", "ratio"), ("budget", "budget")):
        if config.get(name) is not None and (dialled or kind != "scale"):
            return kind, _number(config[name])
    return "", 0.0


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"a number was expected, got {value!r}")
    return float(value)


def _optional(value: Any) -> _Number:
    return None if value is None else _number(value)


def _positive(value: Any) -> _Number:
    if value is not None and _number(value) <= 0:
        raise ValueError(f"a ratio above 0 was expected, got {value}")
    return _optional(value)


def kind_of(dast: Mapping[str, Any]) -> list[str]:
    """DAST's mode, if it is not the default."""
    return [] if dast.get("mode", "repaired") == "repaired" else [str(dast["mode"])]


def alpha_of(dast: Mapping[str, Any]) -> float:
    """DAST's weight of attention against NLL."""
    return _number(dast.get("alpha", DEFAULT_ALPHA))


def beside_defaults(dast: Mapping[str, Any]) -> list[str]:
    """What else a `dast` row differs in; each mode has settings that it does not read."""
    defaults = to_dict(DASTConfig())
    unread = {"mode", "prior"} if kind_of(dast) else {"mode", "alpha", "ppl_sign"}
    return [
        f"{name} {value:g}" if isinstance(value, (int, float)) else f"{name} {value}"
        for name, value in sorted(dast.items())
        if name not in unread and value != defaults.get(name)
    ]


def _comparable(config: Mapping[str, Any]) -> dict[str, str]:
    """What two runs must share for their rows to be compared, by dotted name."""
    return {name: value for name, value in _flat(config).items() if not _SWEPT.fullmatch(name)}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return flat


def titles_of(runs: Sequence[Run]) -> dict[str, str]:
    """Per group, its task and what tells it from other groups of that task."""
    groups = {run.group: _comparable(run.config) for run in runs}
    titles = {}
    for group, settings in groups.items():
        task = settings["task"]
        others = [other for other in groups.values() if other["task"] == task]
        names = sorted({name for other in others for name in other})
        differing = [name for name in names if len({other.get(name) for other in others}) > 1]
        said = [f"{name.removeprefix('settings.')} {_short(settings.get(name))}" for name in differing]
        titles[group] = f"{task} ({', '.join(said)})" if said else task
    return titles


def _short(value: str | None) -> str:
    if value is None:
        return "unknown"
    return value if len(value) <= 24 else hashlib.sha256(value.encode("utf-8", "replace")).hexdigest()[:8]


def _command(config: Mapping[str, Any]) -> str:
    """What to type for this run; adapter and calibration are known by content only: theirs to add."""
    flat: dict[str, Any] = {
        **config,
        **{f"settings.{name}": value for name, value in config["settings"].items()},
    }
    flat |= {f"settings.dast.{name}": value for name, value in config["settings"].get("dast", {}).items()}
    words = ["ctxcompress", "evaluate", "--task", str(config["task"]), "--rows", ",".join(config["rows"])]
    for path, option, default in _OPTIONS:
        if flat.get(path, default) != default and flat[path] is not None:
            value = flat[path]
            words += [option, f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)
