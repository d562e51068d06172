"""One frozen dataclass per method; every value is checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ctxcompress.errors import ConfigError, InputError

Mode = Literal["auto", "text", "soft"]
AllocatorName = Literal["dast", "uniform", "random", "bm25", "embedding", "semi_dynamic", "dast+semi_dynamic"]
DASTMode = Literal["repaired", "scaled", "paper"]
Prior = Literal["retriever", "none"]
Schedule = Literal["anchored", "reference"]
Unit = Literal["word", "token"]
Fusion = Literal["additive", "multiplicative"]
Features = Literal["mean_pool", "last_tokens", "compression_tokens"]
RatioSpace = Literal["log", "linear"]
WindowAlignment = Literal["start", "end"]


@dataclass(frozen=True, kw_only=True)
class DASTConfig:
    """How much each document is worth for a query: DAST (arXiv 2502.11493), eqs. 3-5.

    Args:
        mode: "repaired" reads all question tokens at the model's retrieval heads against a content-free
            question and adds the retriever's prior; "paper" is eq. 5 as printed (last token, all heads,
            temperature 1); "scaled" is the same with temperature 1/N, without which every document gets the
            same budget.
        alpha: weight of global attention against local NLL in eq. 5, in [0, 1]; for "scaled" and "paper".
        ppl_sign: sign of the NLL term in eq. 5; -1 as printed gives predictable documents more, +1 surprising
            ones.
        temperature: of the softmax over documents, > 0; None takes the mode's own.
        prior: "retriever" adds the documents' scores as evidence when all have one; "none" ignores them.
        window_share: in soft mode documents are read for scoring at the finest ratio at which they fill at
            most this part of the model's window, in (0, 1]; the coarsest if none does.
    """

    mode: DASTMode = "repaired"
    alpha: float = 0.5
    ppl_sign: Literal[-1, 1] = -1
    temperature: float | None = None
    prior: Prior = "retriever"
    window_share: float = 0.02

    def __post_init__(self) -> None:
        one_of("dast mode", self.mode, DASTMode)
        one_of("prior", self.prior, Prior)
        one_of("ppl_sign", self.ppl_sign, Literal[-1, 1])
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha must be in [0, 1] (weight of attention against NLL), got {self.alpha}")
        if not 0 < self.window_share <= 1:
            raise ConfigError(
                f"window_share must be in (0, 1] (a part of the window), got {self.window_share}"
            )
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(
                f"temperature must be > 0, got {self.temperature}; leave it None for the mode's own"
            )


@dataclass(frozen=True, kw_only=True)
class DACConfig:
    """How a text loses tokens: DAC (arXiv 2507.11942), entropy and attention fused, pruned in stages.

    Args:
        alpha: weight of accumulated attention against information, in [0, 1].
        fusion: "additive" on min-max normalised signals (the paper's), or "multiplicative" on raw ones.
        schedule: "anchored" aims every stage at the original length and never exceeds the budget;
            "reference" takes each stage from the previous one's length, as the authors' code does.
        unit: "word" removes whole words and characters; "token" removes model tokens, as the paper does.
        stages: number of stages D; None takes min(max(1, tokens // 100), 15).
        no_consecutive: within one stage a unit stays when its left neighbour was just removed.
        strict: a last pass without that rule removes what still exceeds the budget ("anchored" only).
        correct_causal_bias: divide a token's accumulated attention by the number of queries that could see
            it.
        keep_digits: keep units with digits for as long as the budget allows.
        keep_patterns: regular expressions; what they match is protected like a protected span.
    """

    alpha: float = 0.8
    fusion: Fusion = "additive"
    schedule: Schedule = "anchored"
    unit: Unit = "word"
    stages: int | None = None
    no_consecutive: bool = True
    strict: bool = True
    correct_causal_bias: bool = False
    keep_digits: bool = False
    keep_patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        one_of("fusion", self.fusion, Fusion)
        one_of("schedule", self.schedule, Schedule)
        one_of("unit", self.unit, Unit)
        if not 0 <= self.alpha <= 1:
            raise ConfigError(
                f"alpha must be in [0, 1] (weight of attention against information), got {self.alpha}"
            )
        if self.stages is not None and self.stages < 1:
            raise ConfigError(f"stages must be >= 1, got {self.stages}; leave it None for one per 100 tokens")
        import regex  # late: packages that only name settings stay light

        for pattern in self.keep_patterns:
            try:
                regex.compile(pattern)
            except regex.error as error:
                raise ConfigError(
                    f"keep_patterns must be regular expressions, got {pattern!r}: {error}"
                ) from error


@dataclass(frozen=True, kw_only=True)
class SoftConfig:
    """What a soft compressor is made of: semi-dynamic compression (arXiv 2603.25926) on one resident model.

    Args:
        features: how encoder states become soft tokens: means of windows, the last states, or the states of
            learned tokens after the text.
        ratio_set: legal ratios (original / compressed), ascending; each a multiple of the first.
        encoder_layers: layers of the base the encoder runs through; None takes all.
        bidirectional: every token of the encoder sees every other one; False is causal.
        residual: add the window's mean input embedding to the converter's output, so that training starts
            from superposed words instead of noise.
        converter_size: hidden units of the converter.
        encoder_rank: rank of the encoder's LoRA matrices.
        decoder_rank: rank of the decoder's; 0 leaves the decoder as it is.
        lora_scale: factor of the LoRA branch (alpha / rank).
        window: tokens encoded together; longer texts are encoded in pieces of this size.
        window_alignment: "start"; "end" exists for checkpoints that were trained so.
        pool_end_token: let the appended end token take part in the last window, as the authors do.
        ratio_space: distances of the ratio selector.
    """

    features: Features = "mean_pool"
    ratio_set: tuple[int, ...] = (2, 4, 8, 16, 32)
    encoder_layers: int | None = None
    bidirectional: bool = True
    residual: bool = True
    converter_size: int = 2048
    encoder_rank: int = 32
    decoder_rank: int = 16
    lora_scale: float = 2.0
    window: int = 512
    window_alignment: WindowAlignment = "start"
    pool_end_token: bool = False
    ratio_space: RatioSpace = "log"

    def __post_init__(self) -> None:
        one_of("features", self.features, Features)
        one_of("window_alignment", self.window_alignment, WindowAlignment)
        one_of("ratio_space", self.ratio_space, RatioSpace)
        ratios = tuple(self.ratio_set)
        if not ratios or ratios[0] < 2 or list(ratios) != sorted({*ratios}):
            raise ConfigError(f"ratio_set must be ascending whole numbers >= 2, got {list(ratios)}")
        if any(ratio % ratios[0] or self.window % ratio for ratio in ratios):
            raise ConfigError(
                f"every ratio must be a multiple of the finest and divide the window of {self.window} "
                f"tokens, got {list(ratios)}"
            )
        for name in ("converter_size", "encoder_rank", "window"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.encoder_layers is not None and self.encoder_layers < 1:
            raise ConfigError(f"encoder_layers must be >= 1, got {self.encoder_layers}; None takes all")

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> SoftConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown setting, or a value out of its range.
        """
        known = {entry.name for entry in dataclasses.fields(cls)}
        if not known >= content.keys():
            raise ConfigError(
                f"a soft compressor has the settings {sorted(known)}, got {sorted(content.keys() - known)}"
            )
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
        }
        return cls(**values)


def one_of(name: str, value: object, choices: Any) -> Any:
    """Return `value` if the `Literal` type `choices` lists it.

    Raises:
        ConfigError: otherwise; names the choices.
    """
    allowed = get_args(choices)
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def check_target(budget: object, compression_ratio: object, ratio_scale: object = None) -> None:
    """Refuse anything but exactly one of a token budget, a ratio, and a dial of predicted ratios.

    Raises:
        ConfigError: several, none, a ratio that is not a finite number >= 1, or a dial that is not finite.
        InputError: a budget that is not a whole number >= 1.
    """
    targets = {"budget": budget, "compression_ratio": compression_ratio, "ratio_scale": ratio_scale}
    given = [name for name, value in targets.items() if value is not None]
    if len(given) != 1:
        raise ConfigError(
            "give one of budget (tokens), compression_ratio (original / compressed) and, for semi_dynamic, "
            f"ratio_scale (+1 doubles predicted ratios), got {' and '.join(given) or 'none'}"
        )
    if budget is not None:
        if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
            raise InputError(
                f"budget must be a whole number of tokens >= 1, got {budget!r}; to keep nothing, pass no "
                "documents"
            )
    elif ratio_scale is not None:
        if not isinstance(ratio_scale, (int, float)) or not math.isfinite(ratio_scale):
            raise ConfigError(f"ratio_scale must be a finite number, got {ratio_scale!r}")
    elif not isinstance(compression_ratio, (int, float)) or not 1 <= compression_ratio < math.inf:
        remedy = ""
        if isinstance(compression_ratio, float) and 0 < compression_ratio < 1:
            remedy = f"; to keep {compression_ratio:.0%} write {1 / compression_ratio:g}"
        raise ConfigError(
            "compression_ratio must be a finite number >= 1 (original / compressed), got "
            f"{compression_ratio!r}{remedy}"
        )


def to_dict(config: DASTConfig | DACConfig | SoftConfig) -> dict[str, Any]:
    """JSON-ready form; the class is rebuilt by `type(config)(**to_dict(config))`."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }
