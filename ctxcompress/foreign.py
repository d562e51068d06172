"""Any adapter by folder or hub name; others' checkpoints used like ours; any decoder exported for any engine.

    sdcc   semi-dynamic compression (arXiv 2603.25926): config.json, projector.pth, and encoder/ and decoder/,
           each a LoRA adapter or a whole model
    lclm   LCLM (arXiv 2606.09659): model_config.json, adapter/adapter.safetensors, and encoder/ and decoder/,
           whole models

Both have the same data flow as ours, but two different bases: the encoder's states may have another size than
the decoder's embeddings. What differs is told by the configuration: mask, end tokens, where windows start.
None of their code is run; the only pickle is projector.pth, read as tensors and nothing else.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ctxcompress import checkpoint
from ctxcompress.backbone import Backbone
from ctxcompress.checkpoint import HubFolder
from ctxcompress.config import SoftConfig
from ctxcompress.errors import CheckpointError, ConfigError
from ctxcompress.soft import DECODER, ENCODER, Converter, Features, SoftCompressor

Base = Backbone | str | os.PathLike[str]
Layout = Literal["sdcc", "lclm"]

# config.json records paths of the machine that trained; these are the models they end in.
_HUB_IDS = {
    name: f"Qwen/{name}"
    for name in ("Qwen3-Embedding-0.6B", "Qwen3-0.6B", "Qwen3-4B", "Qwen3-4B-Instruct-2507")
}
_OLD_NAMES = {
    "comp_ratio_or_len": "num_doc_tokens",
    "feature_extract_method": "compress_method",
    "mlp_converter_hidden_dim": "mlp_hidden_dim",
    "base_encoder_model_path": "base_embed_model_path",
    "base_decoder_model_path": "base_gen_model_path",
}
_METHODS = {
    "mean_pooling": True,
    "mean_pooling_by_ratio": True,
    "mean_pooling_causal": False,
    "mean_pooling_by_ratio_causal": False,
}
"""Methods of the semi-dynamic authors that we can run, and whether their encoder is bidirectional."""
# Our parameter -> their key.
_PROJECTOR = {
    "converter.norm.weight": "rms_norm.weight",
    "converter.up.weight": "up_proj.weight",
    "converter.down.weight": "down_proj.weight",
}
_HEAD = {f"ratio_head.{kind}": f"compress_ratio_head.{kind}" for kind in ("weight", "bias")}
_ADAPTER = {
    "converter.norm.weight": "norm.weight",
    "converter.up.weight": "fc1.weight",
    "converter.up.bias": "fc1.bias",
    "converter.down.weight": "fc2.weight",
    "converter.down.bias": "fc2.bias",
}
_TRAINED_TOKENS = 1300  # the longest context of the semi-dynamic authors' training
_CONFIGS = ("config.json", "model_config.json")
_THEIR_FILES = (
    "README.md",
    "projector.pth",
    "adapter/*.safetensors",
    *(
        f"{folder}/*.{suffix}"
        for folder in ("encoder", "decoder", "embed_model", "gen_model")
        for suffix in ("json", "safetensors", "txt", "jinja")
    ),
)


@dataclass(frozen=True, slots=True)
class _Given:
    """What the caller says about the bases.

    Attributes:
        load: how a base is loaded by name.
        bases: of a role, whatever the checkpoint says.
        resident: what a decoder's adapter is put on; a whole decoder in the checkpoint replaces it.
    """

    load: Callable[[str], Backbone]
    bases: Mapping[str, Base | None]
    resident: Backbone | None = None


class ForeignCompressor(SoftCompressor):
    """A compressor whose encoder and decoder are different models, with the rules it was trained by.

    Args:
        encoder: its weights are shared, never changed; all its layers are used.
        decoder: the same.
        config: `residual` must be False.
        end_ids: tokens appended to every text; `pool_end_token` says whether they are pooled.
        bias: whether the converter's linear maps have biases.

    Attributes:
        around: token ids that the decoder was trained to see before and after the soft tokens of a text.
    """

    def __init__(
        self, encoder: Backbone, decoder: Backbone, config: SoftConfig, *, end_ids: Sequence[int], bias: bool
    ) -> None:
        nn.Module.__init__(self)  # the parent's own builds both roles from one base
        self.config = config
        self.base_name = decoder.name
        self.encoder = encoder.sharing(encoder.layers_heads[0])
        self.decoder_model = decoder.sharing()
        hidden, embedding = (part.model.config.hidden_size for part in (encoder, decoder))
        with torch.device(encoder.device):
            self.converter = Converter(hidden, config.converter_size, embedding, 1.0, residual=False)
            if bias:
                self.converter.up = nn.Linear(hidden, config.converter_size)
                self.converter.down = nn.Linear(config.converter_size, embedding)
            self.ratio_head = nn.Linear(hidden, 1)
        # A copy: the last end token is the one that `read` appends, and it may not be the tokenizer's own.
        self.tokenizer = copy.deepcopy(encoder.tokenizer)
        self.tokenizer.eos_token = self.tokenizer.convert_ids_to_tokens(end_ids[-1])
        self._before_end = tuple(end_ids[:-1])
        self._decoder_tokenizer = decoder.tokenizer
        self.around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self.window = min(config.window, encoder.window - len(end_ids))
        self.base_fingerprint = f"{decoder.fingerprint}-{encoder.fingerprint}"
        self.base_window = decoder.window
        self.fingerprint = ""

    @functools.cached_property
    def decoder(self) -> Backbone:
        """The model that reads the soft tokens."""
        return Backbone(
            self.decoder_model, self._decoder_tokenizer, name=self.base_name, window=self.base_window
        )

    def read(
        self, texts: Sequence[Sequence[int]], ratios: Sequence[int], last: Sequence[bool] | None = None
    ) -> tuple[Features, Tensor]:
        """As the parent's; last pieces have all end tokens, others only the one that the parent appends."""
        ends = [self._before_end if closed else () for closed in last or [True] * len(texts)]
        return super().read([[*ids, *end] for ids, end in zip(texts, ends, strict=True)], ratios, last)

    def pieces(self, tokens: int) -> list[tuple[int, int]]:
        """As the parent's, with room for all end tokens in the last piece."""
        pieces = super().pieces(tokens + len(self._before_end))
        return [(start, min(stop, tokens)) for start, stop in pieces]

    def size(self, tokens: int, ratio: int) -> int:
        """As the parent's, with all end tokens where they are pooled."""
        return tokens if ratio == 1 else super().size(tokens + len(self._before_end), ratio)

    def embedded(self, ids: Sequence[int], ratio: int) -> Tensor:
        """As the parent's, with all end tokens where they are pooled."""
        return super().embedded([*ids, *self._before_end], ratio)


def resolve_adapter(adapter: str | os.PathLike[str]) -> Path:
    """The folder of an adapter, ours or others': itself if it is local, else the hub's, in its cache.

    From the hub the configuration comes first and decides what else does, all of the same commit: nothing of
    what is no adapter, no code, and no pickle but projector.pth.

    Args:
        adapter: a folder, or `OWNER/REPOSITORY[@REVISION][/SUB/FOLDER]` of the hub; a `Path` is always local.

    Raises:
        CheckpointError: neither, out of reach, or no adapter.
    """
    if Path(adapter).is_dir():
        return Path(adapter)
    place = HubFolder.named(adapter)
    snapshot = place.fetch(_CONFIGS)
    theirs = is_foreign(snapshot / place.inside)
    if theirs is None:
        try:
            checkpoint.describe(snapshot / place.inside)
        except CheckpointError as error:
            raise CheckpointError(
                f"the hub's {str(place)!r} must be an adapter: {error}, and where a repository has several, "
                "name one: OWNER/REPOSITORY/SUB/FOLDER"
            ) from error
    pinned = replace(place, revision=snapshot.name)
    return pinned.fetch(_THEIR_FILES if theirs else ("README.md", *checkpoint.FILES)) / place.inside


def load_adapter(base: Backbone, adapter: str | os.PathLike[str]) -> SoftCompressor:
    """Load an adapter of any layout for the model that encodes documents and writes prompts.

    Ours knows its base and accepts no other. Others record a path at most: that `base` is the right one shows
    only in names, shapes and vocabulary. Their encoders, and decoders that are whole models, are loaded
    beside `base`, on its device and in its dtype.

    Args:
        base: the model the adapter is for.
        adapter: see `resolve_adapter`.

    Raises:
        CheckpointError: see `resolve_adapter`, `checkpoint.load` and `load_foreign`; or another vocabulary.
        ModelError: a base model of others' cannot be loaded.
    """
    folder = resolve_adapter(adapter)
    if is_foreign(folder) is None:
        return checkpoint.load(base, folder)
    compressor = _load(folder, _given(base.device, base.model.dtype, {}, base), None)
    _check_vocabulary(base, compressor, folder)
    return compressor


def measured(folder: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """What the card of a local adapter measured, by ratio and mode; nothing if it is not one of ours.

    Raises:
        CheckpointError: no adapter is there.
    """
    found: dict[str, dict[str, float]] = (
        {} if is_foreign(folder) else checkpoint.describe(Path(folder))["measured"]
    )
    return found


def is_foreign(folder: str | os.PathLike[str]) -> Layout | None:
    """Whose layout a local folder has; None if it is neither of those `load_foreign` reads."""
    path = Path(folder)
    if _keys(path / "model_config.json") & {"compression_ratio", "chunk_size"}:
        return "lclm"
    if _keys(path / "config.json") & {"comp_ratio_or_len", _OLD_NAMES["comp_ratio_or_len"]}:
        return "sdcc"
    return None


def load_foreign(
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    encoder: Base | None = None,
    decoder: Base | None = None,
    end_tokens: Sequence[int] | None = None,
) -> ForeignCompressor:
    """Load a checkpoint of the semi-dynamic authors or of LCLM.

    Of the semi-dynamic authors' two pooling rules this is the one they train with: windows end at the last
    token. Their partial first window is divided by the whole window's size, ours by the tokens in it; the
    converter's norm removes that factor.

    Args:
        folder: see `resolve_adapter`.
        device: None takes CUDA if there is one, else the CPU.
        dtype: None takes bfloat16 where the processor computes in it, else float32.
        encoder: base model of the encoder, loaded or by name; None takes the one the checkpoint names.
        decoder: the same for the decoder.
        end_tokens: ids appended to every text, for "sdcc", which does not record them; None takes what the
            authors' latest code appends: what the encoder's tokenizer adds by itself, then its end token
            unless that is already last.

    Raises:
        CheckpointError: missing files or keys, wrong shapes, NaN, pickles in place of safetensors, or an
            unknown layout or method.
        ConfigError: `end_tokens` that are no tokens, or given for LCLM.
        ModelError: a base model cannot be loaded.
    """
    given = _given(device, dtype, {ENCODER: encoder, DECODER: decoder})
    return _load(resolve_adapter(folder), given, end_tokens)


def export_merged(compressor: SoftCompressor, folder: str | os.PathLike[str]) -> None:
    """Write the decoder as a plain Hugging Face model, its adapter merged into a copy of the weights.

    For engines that take embeddings but no adapters. The compressor and its base stay as they are; this needs
    memory for one more copy of the adapted weights. The tokenizer is written, too.

    Args:
        compressor: whose decoder to write.
        folder: made if missing; files in it are replaced.
    """
    decoder = compressor.decoder
    model = decoder.sharing()
    adapted = [(name, module) for name, module in model.named_modules() if hasattr(module, "base_layer")]
    for name, module in adapted:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _merged(module))
    model.save_pretrained(folder)
    decoder.tokenizer.save_pretrained(folder)


def _given(
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    bases: Mapping[str, Base | None],
    resident: Backbone | None = None,
) -> _Given:
    @functools.cache  # where both roles have the same base, its weights are there once
    def load(name: str) -> Backbone:
        if resident is not None and name == resident.name:
            return resident
        return Backbone.from_pretrained(name, device=device, dtype=dtype)

    return _Given(load, bases, resident)


def _load(path: Path, given: _Given, end_tokens: Sequence[int] | None) -> ForeignCompressor:
    layout = is_foreign(path)
    if layout is None:
        raise CheckpointError(
            f"{path} must hold config.json with comp_ratio_or_len (semi-dynamic) or model_config.json with "
            f"compression_ratio (LCLM), got neither; check the path, or name the sub-folder"
        )
    if layout == "lclm" and end_tokens is not None:
        raise ConfigError("end_tokens are for semi-dynamic checkpoints, got an LCLM one; leave them out")
    try:
        compressor = _load_lclm(path, given) if layout == "lclm" else _load_sdcc(path, given, end_tokens)
    except KeyError as error:
        raise CheckpointError(
            f"the configuration in {path} needs the key {error}, which is missing; copy the checkpoint again"
        ) from error
    compressor.finish()
    return compressor


def _check_vocabulary(base: Backbone, compressor: ForeignCompressor, folder: Path) -> None:
    """Documents and prompts come in the base's ids: the encoder reads the ones, the decoder the others."""
    encoder, decoder = compressor.tokenizer, compressor.decoder.tokenizer
    for role, wanted, got in (
        # Documents have no control tokens, so the encoder need not know the template's.
        (ENCODER, *(each.backend_tokenizer.get_vocab(False) for each in (base.tokenizer, encoder))),
        (DECODER, *(each.get_vocab() for each in (base.tokenizer, decoder))),
    ):
        if not wanted.items() <= got.items():
            raise CheckpointError(
                f"the {role} of {folder} must read the tokens of {base.name!r}, which encodes documents and "
                "prompts, got another vocabulary; load the model that the checkpoint was trained with"
            )


def _merged(adapted: Any) -> nn.Linear:
    """One linear map that computes what `adapted` does."""
    base = adapted.base_layer
    plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    with torch.no_grad():
        # In float32: the sum is rounded once, to the base's dtype.
        weight = base.weight.float()
        for name in adapted.active_adapters:
            up, down = adapted.lora_B[name].weight.float(), adapted.lora_A[name].weight.float()
            weight = weight + adapted.scaling[name] * (up @ down)
    plain.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
    plain.bias = base.bias
    return plain


def _load_sdcc(path: Path, given: _Given, end_tokens: Sequence[int] | None) -> ForeignCompressor:
    settings = _json(path / "config.json")
    settings |= {
        new: settings[old] for new, old in _OLD_NAMES.items() if new not in settings and old in settings
    }
    method = settings["feature_extract_method"]
    if method not in _METHODS:
        raise CheckpointError(
            f"feature_extract_method in {path} must be one of {', '.join(_METHODS)}, got {method!r}; choose "
            "a checkpoint that pools means"
        )
    keep = settings["comp_ratio_or_len"]
    ratios = sorted({round(1 / share) for share in _shares(keep, path)})
    size = math.lcm(*ratios)
    config = _config(
        path,
        ratio_set=tuple(ratios),
        bidirectional=_METHODS[method],
        converter_size=settings["mlp_converter_hidden_dim"],
        window=_TRAINED_TOKENS - _TRAINED_TOKENS % size or size,
        window_alignment="end",
        pool_end_token=True,
        ratio_space="log" if settings.get("discretize_compare_in_log") else "linear",
    )
    homes = {
        role: next((path / name for name in names if (path / name).is_dir()), path / names[0])
        for role, names in ((ENCODER, ("encoder", "embed_model")), (DECODER, ("decoder", "gen_model")))
    }
    bases = _bases(homes, {role: str(settings[f"base_{role}_model_path"]) for role in homes}, given)
    end_ids = _end_ids(bases[ENCODER], end_tokens)
    compressor = ForeignCompressor(bases[ENCODER], bases[DECODER], config, end_ids=end_ids, bias=False)
    for role in homes:
        _load_lora(compressor, role, homes[role])
    tensors = _projector(path / "projector.pth")
    if any(key.startswith("compress_ratio_head.") for key in tensors):
        names = _PROJECTOR | _HEAD
    else:
        names = _PROJECTOR
        _fix_ratio(compressor)
    _fill(compressor, names, tensors, path / "projector.pth")
    return compressor


def _load_lclm(path: Path, given: _Given) -> ForeignCompressor:
    settings = {"boundary_overlap": 0, "adapter_type": "mlp", **_json(path / "model_config.json")}
    settings.setdefault("compression_ratio", settings.get("chunk_size"))
    for key, wanted in (
        ("pooling", "mean"),
        ("encoder_mask_type", "causal"),
        ("boundary_overlap", 0),
        ("adapter_type", "mlp"),
    ):
        if settings[key] != wanted:
            raise CheckpointError(
                f"{key} in {path}/model_config.json must be {wanted!r} as in all published checkpoints, got "
                f"{settings[key]!r}; choose one of those"
            )
    homes = {role: path / role for role in (ENCODER, DECODER)}
    bases = _bases(homes, {}, given)
    config = _config(
        path,
        ratio_set=(settings["compression_ratio"],),
        bidirectional=False,
        converter_size=bases[DECODER].model.config.hidden_size,
        window=settings["encoder_window_size"],
    )
    # LCLM appends no end token. The one `read` adds is not pooled, and a causal encoder's text cannot see it.
    end_ids = _end_ids(bases[ENCODER], None)[-1:]
    compressor = ForeignCompressor(bases[ENCODER], bases[DECODER], config, end_ids=end_ids, bias=True)
    file = path / "adapter" / "adapter.safetensors"
    _fill(compressor, _ADAPTER, _safetensors(file), file)
    _fix_ratio(compressor)
    start, end = bases[DECODER].tokenizer.convert_tokens_to_ids(["<|memory_start|>", "<|memory_end|>"])
    if None in {start, end} or start == end:
        raise CheckpointError(
            "the decoder's tokenizer must know <|memory_start|> and <|memory_end|>, that of "
            f"{bases[DECODER].name} does not; copy the tokenizer files of the checkpoint's decoder/ again"
        )
    compressor.around = ((start,), (end,))
    return compressor


def _config(path: Path, **values: Any) -> SoftConfig:
    try:
        # Ranks are the adapters' own and need not be equal; nothing reads these two.
        return SoftConfig(residual=False, encoder_rank=1, decoder_rank=0, **values)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(
            f"the configuration in {path} describes no compressor of ours: {error}"
        ) from error


def _shares(keep: Any, path: Path) -> list[float]:
    """The fractions of tokens to keep, which is how the authors write ratios."""
    shares = list(keep) if isinstance(keep, list) else [keep]
    if not shares or not all(isinstance(share, float) and 0 < share < 1 for share in shares):
        raise CheckpointError(
            f"comp_ratio_or_len in {path} must be fractions to keep, between 0 and 1, got {keep!r}; choose a "
            "checkpoint with such"
        )
    return shares


def _bases(homes: Mapping[str, Path], recorded: Mapping[str, str], given: _Given) -> dict[str, Backbone]:
    """The base model of each role: the caller's, a whole one in the checkpoint, or the recorded one."""
    bases = {}
    for role, home in homes.items():
        name = recorded.get(role, "")
        source = given.bases.get(role) or _whole_model(home)
        if source is None and role == DECODER and given.resident is not None:
            source = _checked_name(given.resident, name)
        source = source or _base_name(name, role)
        bases[role] = source if isinstance(source, Backbone) else given.load(str(source))
    return bases


def _checked_name(base: Backbone, recorded: str) -> Backbone:
    """`base`, unless its name is that of another model than the recorded one, which shapes need not show."""
    wanted, got = (name.rstrip("/").split("/")[-1] for name in (recorded, base.name))
    if wanted != got and {wanted, got} <= _HUB_IDS.keys():
        raise CheckpointError(
            f"the adapter's decoder was trained on {_HUB_IDS[wanted]}, got {base.name!r}; load that model"
        )
    return base


def _whole_model(home: Path) -> Path | None:
    """`home` if it holds a whole model, None if it holds an adapter or nothing."""
    if not (home / "config.json").is_file():
        return None
    if not any((home / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        found = sorted(file.name for file in home.iterdir())
        raise CheckpointError(
            f"{home} must hold model.safetensors, got {', '.join(found)}; pickled weights (.bin) are not "
            "read, save them as safetensors with save_pretrained"
        )
    if not (home / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{home} must hold tokenizer.json, got none; copy the tokenizer files of its base model into it"
        )
    return home


def _base_name(recorded: str, role: str) -> str:
    """Where the base model is: the recorded path if it exists here, else the hub's model of that name."""
    parts = recorded.rstrip("/").split("/")
    if recorded and Path(recorded).is_dir():
        return recorded
    if parts[-1] in _HUB_IDS:
        return _HUB_IDS[parts[-1]]
    if len(parts) == 2 and all(parts):
        return recorded
    raise CheckpointError(
        f"the {role}'s base model was expected at {recorded!r}, got no such folder: checkpoints name it by "
        f"its path where they were trained; with load_foreign, pass {role}=, the name or folder of that model"
    )


def _end_ids(encoder: Backbone, wanted: Sequence[int] | None) -> tuple[int, ...]:
    tokenizer = encoder.tokenizer
    if wanted is not None:
        ids = tuple(wanted)
        if not ids or not all(0 <= token < len(tokenizer) for token in ids):
            raise ConfigError(
                f"end_tokens must be one or more ids of the encoder's {len(tokenizer)} tokens, got "
                f"{list(ids)}; leave them out for the authors' own"
            )
        return ids
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"the encoder's tokenizer ({encoder.name}) must have an end token, got none; pass end_tokens="
        )
    plain, ended = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    own = tuple(ended[ended.index(plain[-1]) + 1 :])
    return own if own[-1:] == (tokenizer.eos_token_id,) else (*own, tokenizer.eos_token_id)


def _load_lora(compressor: ForeignCompressor, role: str, home: Path) -> None:
    """Put the adapter in `home`, if there is one, on the encoder or the decoder."""
    from peft import LoraConfig, inject_adapter_in_model

    if not (home / "adapter_config.json").is_file():
        return
    settings = _json(home / "adapter_config.json")
    plain = {"peft_type": "LORA", "bias": "none", "use_dora": False, "modules_to_save": None}
    for key, wanted in plain.items():
        if settings.get(key, wanted) != wanted:
            raise CheckpointError(
                f"{key} in {home}/adapter_config.json must be {wanted!r}, got {settings[key]!r}; merge the "
                "adapter into its base with PEFT and save that as a whole model"
            )
    model = compressor.encoder if role == ENCODER else compressor.decoder_model
    config = LoraConfig(
        r=settings["r"],
        lora_alpha=settings["lora_alpha"],
        target_modules=settings["target_modules"],
        use_rslora=settings.get("use_rslora", False),
        rank_pattern=settings.get("rank_pattern") or {},
        alpha_pattern=settings.get("alpha_pattern") or {},
    )
    try:
        inject_adapter_in_model(config, model, adapter_name=role)
    except ValueError as error:
        raise CheckpointError(
            f"the adapter in {home} does not fit its base model: {error}; pass {role}= with the right one"
        ) from error
    file = home / "adapter_model.safetensors"
    # Encoders are saved without a head, decoders with one: names differ by "model.".
    found = {
        key.removeprefix("base_model.model.").removeprefix("model."): tensor
        for key, tensor in _safetensors(file).items()
    }
    names = {
        name: name.removeprefix("model.").replace(f".{role}.weight", ".weight")
        for name, _ in model.named_parameters()
        if "lora_" in name
    }
    _fill(model, names, found, file)


def _fill(module: nn.Module, names: Mapping[str, str], tensors: Mapping[str, Tensor], file: Path) -> None:
    """Put tensors of a file in place.

    Args:
        module: to fill.
        names: parameter of the module -> key of the file; all of the file must be used.
        tensors: of the file.
        file: for messages.
    """
    missing, unknown = set(names.values()) - tensors.keys(), tensors.keys() - set(names.values())
    if missing or unknown:
        raise CheckpointError(
            f"{file} must hold {len(names)} tensors by name, got {_few(missing)} missing and {_few(unknown)} "
            "unknown; copy the checkpoint again, or pass the base it was trained on"
        )
    for name, key in names.items():
        parameter, tensor = module.get_parameter(name), tensors[key]
        if parameter.shape != tensor.shape or not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{key} in {file} must be finite and of shape {tuple(parameter.shape)}, got shape "
                f"{tuple(tensor.shape)} or NaN; copy the checkpoint again, or pass the base it was trained on"
            )
        parameter.data = tensor.to(parameter.device)


def _few(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "") or "none"


def _fix_ratio(compressor: ForeignCompressor) -> None:
    """For checkpoints without a ratio head: it predicts the middle of the set for every text."""
    logs = [math.log2(ratio) for ratio in compressor.config.ratio_set]
    nn.init.zeros_(compressor.ratio_head.weight)
    nn.init.constant_(compressor.ratio_head.bias, sum(logs) / len(logs))


def _projector(file: Path) -> dict[str, Tensor]:
    """Tensors of projector.pth by name, in any of the three forms it was saved in."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        # torch explains at length how to switch the check off, which nobody should.
        reason = (str(error) or repr(error)).splitlines()[0]
        raise CheckpointError(
            f"{file} must hold tensors and nothing else, got: {reason}; copy the checkpoint again"
        ) from error
    flat: dict[str, Any] = {}
    for name, value in (content if isinstance(content, dict) else {"": content}).items():
        flat |= (
            {f"{name}.{key}": part for key, part in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    strange = [name for name, value in flat.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(
            f"{file} must hold tensors by name, got {_few(map(str, strange))}; copy it again"
        )
    return {name.removeprefix("projector."): value for name, value in flat.items()}


def _safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        pickles = [name.name for name in file.parent.glob("*") if name.suffix in {".bin", ".pt", ".pth"}]
        remedy = (
            f"pickles ({_few(pickles)}) are not read, save them as safetensors"
            if pickles
            else "copy it again"
        )
        raise CheckpointError(f"{file} must be a safetensors file, got: {error}; {remedy}") from error
    return tensors


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return dict(content.items())
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file} must hold a JSON object, got: {error}; copy the checkpoint again"
        ) from error


def _keys(file: Path) -> set[str]:
    try:
        return set(_json(file))
    except CheckpointError:
        return set()
