"""A training run in one TOML file; every value is checked when it is read."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ctxcompress.config import SoftConfig, one_of
from ctxcompress.embedded import EMBEDDED
from ctxcompress.errors import ConfigError, InputError

Objective = Literal["reconstruction", "continuation", "recall", "cloze", "answer"]
_NEEDS = {
    "reconstruction": "texts",
    "continuation": "texts",
    "recall": "texts",
    "cloze": "texts",
    "answer": "questions",
}
# Whole numbers and the least each can be.
_WHOLE = {
    "steps": 1,
    "batch_size": 1,
    "accumulation": 1,
    "save_every": 1,
    "longest_document": 1,
    "questions_per_sample": 1,
    "warmup": 0,
    "workers": 0,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run trains on what, and for how long.

    Args:
        output: folder of the run: adapters, metrics, and what is needed to go on.
        base: model the adapters are for: "embedded", a local folder or a hub id.
        start: folder of adapters to go on from; "" starts fresh.
        start_weight: part of `start` in the adapters at the end, whose other part is what was trained
            (weight-space ensembling, Wortsman et al. 2022): so less is forgotten of what `start` could do.
        compressor: what to build when starting fresh.
        texts: files of texts, `{"text"}` a line, for all objectives but answers.
        questions: files of questions with documents, for answers.
        objectives: weights of the objectives; each batch draws one. "reconstruction" repeats a text,
            "continuation" goes on after it, "recall" is asked what follows a few words in the middle of it,
            "cloze" is asked for a name or number by some of the words around it, "answer" answers questions.
        ratios: weights of the compression ratios; each batch draws one; 1 is raw text.
        mixed: part of the batches of questions in which every chunk draws a ratio of its own, as allocators
            give them: raw text stands beside soft tokens of all ratios.
        tokens: shortest and longest text of all objectives but answers, in tokens.
        documents: fewest and most documents of a question, whose others come from the same title, and of
            recall and cloze, whose others are other texts.
        longest_document: documents with more tokens are left out.
        chunk_tokens: weights of the sizes, in tokens, that a question's documents are cut to, chunks being
            encoded alone; each batch draws one; 0 leaves documents whole.
        questions_per_sample: most questions, of answers, recall or cloze, asked in turn about one set of
            documents, which is encoded once.
        distillation: weight of KL(decoder reading raw text || decoder reading soft tokens) beside the
            cross-entropy of answers and continuations.
        attention: weight of a loss that makes the base's retrieval heads look from the question to the gold
            document, where a sample has several; see `losses.Objective`.
        steps: optimizer steps.
        batch_size: samples of a forward pass on each process.
        accumulation: forward passes of an optimizer step.
        learning_rate: highest.
        warmup: steps of linear warm-up; a cosine to `final_learning_rate` follows.
        final_learning_rate: lowest, as a part of `learning_rate`.
        weight_decay: of AdamW.
        betas: of AdamW.
        clip: largest norm of the gradient.
        seed: of samples and initial weights.
        save_every: steps between checkpoints.
        workers: processes beside each training process that make its batches ahead of time; on a GPU, as many
            as it has cores to spare. They are forked, which Windows cannot do.
        tensorboard: also write TensorBoard events.
        notice: sources and licences of the data, for the model card.
    """

    output: str
    base: str = EMBEDDED
    start: str = ""
    start_weight: float = 0.0
    compressor: SoftConfig = field(default_factory=SoftConfig)
    texts: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    objectives: dict[str, float] = field(default_factory=lambda: {"reconstruction": 1.0})
    ratios: dict[int, float] = field(default_factory=lambda: {2: 1.0, 4: 1.0})
    mixed: float = 0.0
    tokens: tuple[int, int] = (16, 48)
    documents: tuple[int, int] = (1, 1)
    longest_document: int = 400
    chunk_tokens: dict[int, float] = field(default_factory=lambda: {0: 1.0})
    questions_per_sample: int = 1
    distillation: float = 0.0
    attention: float = 0.0
    steps: int = 1000
    batch_size: int = 32
    accumulation: int = 1
    learning_rate: float = 1e-3
    warmup: int = 20
    final_learning_rate: float = 0.1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    seed: int = 0
    save_every: int = 100
    workers: int = 0
    tensorboard: bool = False
    notice: str = ""

    def __post_init__(self) -> None:
        for name, least in _WHOLE.items():
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ConfigError(f"{name} must be a whole number >= {least}, got {getattr(self, name)!r}")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be > 0 and finite, got {getattr(self, name)}")
        for name in ("distillation", "attention", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{name} must be >= 0 and finite, got {getattr(self, name)}; 0 turns it off"
                )
        self._check_parts()
        self._check_pairs()
        self._check_objectives()
        if not self.start:
            self.check(self.compressor)

    def _check_parts(self) -> None:
        for name, whole in (
            ("final_learning_rate", "learning_rate"),
            ("mixed", "the batches of questions"),
            ("start_weight", "the adapters at the end"),
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1] (a part of {whole}), got {getattr(self, name)}")
        if self.start_weight and not self.start:
            raise ConfigError(
                f"start_weight is the part of start in the adapters, got {self.start_weight} without start; "
                "set start, or start_weight to 0"
            )

    def _check_pairs(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must be two numbers in [0, 1), got {list(self.betas)}")
        for name in ("tokens", "documents"):
            low_high = getattr(self, name)
            if len(low_high) != 2 or not 1 <= low_high[0] <= low_high[1]:
                raise ConfigError(
                    f"{name} must be [fewest, most] with 1 <= fewest <= most, got {list(low_high)}"
                )

    def _check_objectives(self) -> None:
        for objective in self.objectives:
            one_of("an objective", objective, Objective)
        if self.objectives.get("recall") and self.tokens[0] < 4:
            raise ConfigError(
                "tokens must be at least 4 for recall, which quotes a quarter of a text, got "
                f"{self.tokens[0]}; raise it, or set recall to 0"
            )
        _check_weights("objectives", self.objectives)
        _check_weights("ratios", self.ratios)
        _check_weights("chunk_tokens", self.chunk_tokens)
        if min(self.chunk_tokens) < 0:
            raise ConfigError(f"chunk_tokens must be whole numbers >= 0, got {sorted(self.chunk_tokens)}")
        for objective, name in _NEEDS.items():
            if self.objectives.get(objective) and not getattr(self, name):
                raise ConfigError(
                    f"the objective {objective!r} needs files, got none; set {name} to file names or patterns"
                )

    def check(self, compressor: SoftConfig) -> None:
        """Refuse what a compressor cannot be trained with; that of `start` is known only when it is loaded.

        Raises:
            ConfigError: names the setting to change.
        """
        ratios = {ratio for ratio, weight in self.ratios.items() if weight}
        unknown = ratios - {1, *compressor.ratio_set}
        if unknown:
            raise ConfigError(
                f"ratios must be 1 (raw text) or of the ratio_set {list(compressor.ratio_set)}, got "
                f"{sorted(unknown)}"
            )
        if 1 in ratios and not compressor.decoder_rank:
            raise ConfigError(
                "ratio 1 (raw text) trains only the decoder's adapter, got decoder_rank 0; remove ratio 1, "
                "or raise decoder_rank"
            )
        sizes = {size for size, weight in self.chunk_tokens.items() if weight}
        for objective, name, longest in (
            ("reconstruction", "tokens", self.tokens[1]),
            ("continuation", "tokens", self.tokens[1]),
            ("recall", "tokens", self.tokens[1]),
            ("cloze", "tokens", self.tokens[1]),
            ("answer", "chunk_tokens", max(sizes)),
            ("answer", "longest_document", 0 if min(sizes) else self.longest_document),
        ):
            if self.objectives.get(objective) and longest > compressor.window:
                raise ConfigError(
                    f"{name} must be at most the compressor's window of {compressor.window} tokens, which "
                    f"are encoded together, got {longest}; lower {name}"
                )

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read a TOML file; relative paths in it are relative to its folder.

        Raises:
            InputError: no such file, or not TOML.
            ConfigError: an unknown or impossible setting.
        """
        tomllib = _tomllib()
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"a training recipe in TOML was expected at {path}, got: {error}") from error
        known = {entry.name for entry in dataclasses.fields(cls)}
        unknown = sorted(set(content) - known)
        if unknown:
            raise ConfigError(f"{path} sets {unknown}, which a recipe does not have; known: {sorted(known)}")
        try:
            return cls(**_settings(content, path.parent))
        except (TypeError, AttributeError) as error:
            raise ConfigError(f"{path} does not fit a recipe: {error}") from error

    def to_json(self) -> str:
        """Everything that makes the run, for its folder."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)


def _settings(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What TOML says, in a recipe's own types; file names relative to `folder`."""
    for name in ("texts", "questions"):
        patterns = content.get(name, [])
        if not isinstance(patterns, list):
            raise ConfigError(f"{name} must be a list of file names or patterns, got {patterns!r}")
        content[name] = tuple(file for pattern in patterns for file in _files(folder, pattern))
    for name in ("output", "start"):
        if content.get(name):
            content[name] = str(folder / content[name])
    if "base" in content and (folder / content["base"]).is_dir():
        content["base"] = str(folder / content["base"])
    for name in {"ratios", "chunk_tokens"} & content.keys():
        if not isinstance(content[name], dict) or not all(key.isdecimal() for key in content[name]):
            raise ConfigError(
                f'{name} must be whole numbers with weights, such as {{ "64" = 1.0 }}, got {content[name]}'
            )
        content[name] = {int(key): weight for key, weight in content[name].items()}
    content["compressor"] = SoftConfig.from_dict(content.get("compressor", {}))
    return _tuples(content)


def _check_weights(name: str, weights: dict[Any, float]) -> None:
    if not weights or min(weights.values()) < 0 or not 0 < sum(weights.values()) < math.inf:
        raise ConfigError(f"{name} must have finite weights >= 0 that are not all 0, got {weights}")


def _tuples(content: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}


def _files(folder: Path, pattern: str) -> list[str]:
    path = Path(pattern)
    root, parts = (Path(path.anchor), path.relative_to(path.anchor)) if path.is_absolute() else (folder, path)
    found = sorted(str(file) for file in root.glob(str(parts)))
    if not found:
        raise InputError(f"{pattern!r} names no file under {folder}; correct the recipe or fetch the data")
    return found


def _tomllib() -> Any:
    """The standard library's reader, or on Python 3.10 the package it came from."""
    return importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
