"""A training run in one TOML file; every value is checked when it is read."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ctxcompress.config import SoftConfig, one_of
from ctxcompress.embedded import EMBEDDED
from ctxcompress.errors import ConfigError, InputError

Objective = Literal["reconstruction", "continuation", "answer"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run trains on what, and for how long.

    Args:
        output: folder of the run: adapters, metrics, and what is needed to go on.
        base: model the adapters are for: "embedded", a local folder or a hub id.
        start: folder of adapters to go on from; "" starts fresh.
        compressor: what to build when starting fresh.
        texts: files of texts, `{"text"}` a line, for reconstruction and continuation.
        questions: files of questions with documents, for answers.
        objectives: weights of the objectives; each batch draws one.
        ratios: weights of the compression ratios; each batch draws one; 1 is raw text.
        tokens: shortest and longest text of reconstruction and continuation, in tokens.
        documents: fewest and most documents of a question; others come from the same title.
        longest_document: documents with more tokens are left out.
        distillation: weight of KL(decoder reading raw text || decoder reading soft tokens) beside the
            cross-entropy of answers and continuations.
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
        tensorboard: also write TensorBoard events.
    """

    output: str
    base: str = EMBEDDED
    start: str = ""
    compressor: SoftConfig = field(default_factory=SoftConfig)
    texts: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    objectives: dict[str, float] = field(default_factory=lambda: {"reconstruction": 1.0})
    ratios: dict[int, float] = field(default_factory=lambda: {2: 1.0, 4: 1.0})
    tokens: tuple[int, int] = (16, 48)
    documents: tuple[int, int] = (1, 1)
    longest_document: int = 400
    distillation: float = 0.0
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
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "save_every", "longest_document"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("tokens", "documents"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ConfigError(
                    f"{name} must be [fewest, most] with 1 <= fewest <= most, got {[low, high]}"
                )
        for objective in self.objectives:
            one_of("an objective", objective, Objective)
        _check_weights("objectives", self.objectives)
        _check_weights("ratios", self.ratios)
        unknown = set(self.ratios) - {1, *self.compressor.ratio_set}
        if unknown and not self.start:
            raise ConfigError(
                f"ratios must be 1 (raw text) or of the ratio_set {list(self.compressor.ratio_set)}, got "
                f"{sorted(unknown)}"
            )
        for objective, files in (("answer", self.questions), ("reconstruction", self.texts)):
            if self.objectives.get(objective) and not files:
                raise ConfigError(
                    f"the objective {objective!r} needs files, got none; set "
                    f"{'questions' if objective == 'answer' else 'texts'} to file names or patterns"
                )
        if self.objectives.get("continuation") and not self.texts:
            raise ConfigError("the objective 'continuation' needs files, got none; set texts to file names")

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
        folder = path.parent
        for name in ("texts", "questions"):
            content[name] = tuple(_files(folder, pattern) for pattern in content.get(name, ()))
            content[name] = tuple(file for files in content[name] for file in files)
        for name in ("output", "start"):
            if content.get(name):
                content[name] = str(folder / content[name])
        if "base" in content and (folder / content["base"]).is_dir():
            content["base"] = str(folder / content["base"])
        if "ratios" in content:
            content["ratios"] = {int(ratio): weight for ratio, weight in content["ratios"].items()}
        try:
            content["compressor"] = SoftConfig(**_tuples(content.get("compressor", {})))
            return cls(**_tuples(content))
        except TypeError as error:
            raise ConfigError(f"{path} does not fit a recipe: {error}") from error

    def to_json(self) -> str:
        """Everything that makes the run, for its folder."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)


def _check_weights(name: str, weights: dict[Any, float]) -> None:
    if not weights or min(weights.values()) < 0 or not sum(weights.values()) > 0:
        raise ConfigError(f"{name} must have weights >= 0 that are not all 0, got {weights}")


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
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    return tomllib
