"""Adapters on disk: `config.json` + safetensors + a model card; saving and loading is the identity.

    FOLDER/config.json                         what it is, the base it belongs to, hashes of the other files
    FOLDER/encoder/adapter_model.safetensors   PEFT's layout, with adapter_config.json
    FOLDER/decoder/adapter_model.safetensors   the same; serving engines load it as a LoRA adapter
    FOLDER/converter.safetensors               converter, ratio head, learned tokens
    FOLDER/calibration.json                    retrieval heads on soft tokens, if they were calibrated
    FOLDER/README.md                           model card

Nothing is pickled and no code is loaded. A folder may come from the Hugging Face hub: `HubFolder` fetches the
files it is asked for and nothing else.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctxcompress import card
from ctxcompress.backbone import Backbone
from ctxcompress.calibration import Calibration
from ctxcompress.config import SoftConfig, to_dict
from ctxcompress.errors import CheckpointError, ConfigError
from ctxcompress.files import write_atomically
from ctxcompress.soft import DECODER, ENCODER, LORA_TARGETS, SoftCompressor

FORMAT = 1
_PEFT_PREFIX = "base_model.model.model."
_HOMES = {
    "encoder": "encoder/adapter_model.safetensors",
    "decoder_model": "decoder/adapter_model.safetensors",
}
_CONVERTER = "converter.safetensors"
_CALIBRATION = "calibration.json"
FILES = (
    *_HOMES.values(),
    f"{ENCODER}/adapter_config.json",
    f"{DECODER}/adapter_config.json",
    _CONVERTER,
    _CALIBRATION,
)
"""All that `config.json` may list; not all adapters have all."""
_HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w-][\w.-]*))?(?:/(.+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubFolder:
    """A folder of a hub repository, OWNER/REPOSITORY[@REVISION][/SUB/FOLDER] as the hub's tools write it.

    Example:
        >>> HubFolder.named("someone/adapters@v1/static/8x")
        HubFolder(repository='someone/adapters', revision='v1', inside='static/8x')
    """

    repository: str
    revision: str | None
    inside: str

    @classmethod
    def named(cls, name: str | os.PathLike[str]) -> HubFolder:
        """The place that a name stands for; a `Path` is never one.

        Raises:
            CheckpointError: it looks like a local path.
        """
        found = _HUB_NAME.fullmatch(name) if isinstance(name, str) else None
        inside = (found[3] or "") if found else ""
        if found is None or (inside and {"", ".", ".."} & set(inside.split("/"))):
            raise CheckpointError(
                "an adapter's folder, or OWNER/REPOSITORY[@REVISION][/SUB/FOLDER] of the hub, was expected, "
                f"got {os.fspath(name)!r}, where there is no folder; check the path"
            )
        return cls(found[1], found[2], inside)

    def __str__(self) -> str:
        revision, inside = (self.revision and f"@{self.revision}") or "", self.inside and f"/{self.inside}"
        return f"{self.repository}{revision}{inside}"

    def fetch(self, patterns: Iterable[str]) -> Path:
        """Download what is not in the hub's cache yet.

        Args:
            patterns: of the files wanted, relative to the folder.

        Returns:
            The repository's snapshot; its name is the commit.

        Raises:
            CheckpointError: no such repository or revision, no access, or out of reach and not in the cache.
        """
        from huggingface_hub import snapshot_download

        prefix = glob.escape(self.inside) + "/" if self.inside else ""
        try:
            return Path(
                snapshot_download(
                    self.repository,
                    revision=self.revision,
                    allow_patterns=[prefix + pattern for pattern in patterns],
                )
            )
        # The errors of the HTTP library below come through as they are, and which library it is has changed.
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise CheckpointError(
                f"the adapter {str(self)!r} was expected on the hub or in its cache, got "
                f"{type(error).__name__}: {reason}; check the spelling and your access, or where there is no "
                f"network, download it first: hf download {self.repository}"
            ) from error


def save(
    compressor: SoftCompressor,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    training: Sequence[Mapping[str, Any]] = (),
    measured: Mapping[str, Mapping[str, float]] | None = None,
    ratio_head: Mapping[str, Any] | None = None,
) -> None:
    """Write a compressor's adapters; `config.json` comes last, so a folder with one is complete.

    Args:
        compressor: to save.
        folder: made if missing; files in it are replaced.
        dtype: of the file; None keeps the tensors' own.
        training: what each stage of the training was, for the model card; see `train.loop`.
        measured: per ratio, as a string, the accuracy of the modes "text" and "soft"; `mode="auto"` follows
            it.
        ratio_head: what the ratio head was fitted to and how well, for the model card.
    """
    from safetensors.torch import save as to_bytes

    path = Path(folder)
    contents = {
        name: to_bytes(tensors, metadata={"format": "pt"})
        for name, tensors in _files(compressor, dtype).items()
    }
    for name in (ENCODER, DECODER):
        if f"{name}/adapter_model.safetensors" in contents:
            contents[f"{name}/adapter_config.json"] = _peft_config(compressor, name)
    description = {
        "format": FORMAT,
        "base": {"name": compressor.base_name, "fingerprint": compressor.base_fingerprint},
        "compressor": to_dict(compressor.config),
        "fingerprint": compressor.identity(),
        "training": list(training),
        "measured": dict(measured or {}),
        "ratio_head": dict(ratio_head or {}),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
    }
    contents["README.md"] = card.render(description).encode()
    for name, content in contents.items():
        write_atomically(path / name, content)
    write_atomically(path / "config.json", (json.dumps(description, indent=1) + "\n").encode())


def load(base: Backbone, folder: str | os.PathLike[str], *, trainable: bool = False) -> SoftCompressor:
    """Read adapters for `base`.

    Args:
        base: the model they were trained on.
        folder: as `save` wrote it.
        trainable: keep adapters in float32; otherwise they take the base's dtype, which is faster.

    Raises:
        CheckpointError: missing or changed files, another format or base, NaN, or a failed self-test.
    """
    path = Path(folder)
    description = describe(path)
    fingerprint = base.fingerprint
    if description["base"]["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"the adapter in {path} was trained on {description['base']['name']!r} "
            f"({description['base']['fingerprint']}), got {base.name!r} ({fingerprint}); load that base, or "
            "train an adapter for this one"
        )
    try:
        config = SoftConfig.from_dict(description["compressor"])
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"config.json in {path} does not describe a compressor: {error}") from error
    compressor = SoftCompressor(base, config)
    tensors: dict[str, Tensor] = {}
    for name, digest in description["files"].items():
        content = _verified(path / name, digest)
        if name.endswith(".safetensors"):
            tensors |= _named(name, content)
    _fill(compressor, tensors, path)
    compressor.finish(trainable=trainable)
    if compressor.fingerprint != description["fingerprint"]:
        raise CheckpointError(
            f"the settings in config.json of {path} must be those its weights were saved with "
            f"({description['fingerprint']}), got others ({compressor.fingerprint}); copy it again"
        )
    return compressor


def annotate(
    folder: str | os.PathLike[str],
    measured: Mapping[str, Mapping[str, float]],
    results: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Record what a saved adapter measures: in `config.json`, and in its card.

    Args:
        folder: of the adapter.
        measured: see `save`.
        results: tables for the card, as `evaluate.measured.measured_rows` makes them.
    """
    path = Path(folder)
    description = {**describe(path), "measured": dict(measured), "results": list(results)}
    write_atomically(path / "README.md", card.render(description).encode())
    write_atomically(path / "config.json", (json.dumps(description, indent=1) + "\n").encode())


def stored_dtype(folder: str | os.PathLike[str]) -> torch.dtype:
    """What an adapter's files are written in; in memory it has the dtype of its base on that machine."""
    from safetensors import safe_open

    with safe_open(Path(folder) / _CONVERTER, "pt") as tensors:
        dtype: torch.dtype = tensors.get_tensor(next(iter(tensors.keys()))).dtype
    return dtype


def calibration(folder: Path) -> Calibration | None:
    """The retrieval heads and weights fitted to an adapter's soft tokens; None if there are none.

    Raises:
        ModelError: the file is damaged.
    """
    file = folder / _CALIBRATION
    return Calibration.load(file) if file.exists() else None


def shipped() -> Path | None:
    """Folder of the embedded model's adapter, if this installation has it."""
    folder = Path(__file__).parent / "adapter"
    return folder if (folder / "config.json").exists() else None


def describe(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's `config.json`.

    Raises:
        CheckpointError: none there, not one of ours, of another format, or listing files that no adapter has.
    """
    try:
        description: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise CheckpointError(
                f"the adapter in {folder} has format {description['format']}, this version reads {FORMAT}; "
                "update ctxcompress, or train the adapter again"
            )
        for key in ("base", "compressor", "files", "measured"):
            description[key].keys()
        description["base"]["name"], description["base"]["fingerprint"], description["fingerprint"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"an adapter folder with a config.json was expected at {folder}, got: {error!r}; check the path"
        ) from error
    strange = sorted(description["files"].keys() - set(FILES))
    if strange:  # such as "../../elsewhere"
        raise CheckpointError(
            f"config.json in {folder} must list files of an adapter only, got {strange[:3]}; copy the whole "
            "folder again"
        )
    return description


def _files(compressor: SoftCompressor, dtype: torch.dtype | None) -> dict[str, dict[str, Tensor]]:
    files: dict[str, dict[str, Tensor]] = {}
    for name, parameter in compressor.trained():
        part, _, rest = name.partition(".")
        tensor = parameter.detach().to("cpu", dtype or parameter.dtype).contiguous()
        if part in _HOMES:
            adapter = ENCODER if part == "encoder" else DECODER
            key = _PEFT_PREFIX + rest.removeprefix("model.").replace(f".{adapter}.weight", ".weight")
            files.setdefault(_HOMES[part], {})[key] = tensor
        else:
            files.setdefault(_CONVERTER, {})[name] = tensor
    return files


def _named(name: str, content: bytes) -> dict[str, Tensor]:
    """Tensors of a file under the compressor's own names."""
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        tensors: dict[str, Tensor] = from_bytes(content)
    except SafetensorError as error:
        raise CheckpointError(f"{name} must be a safetensors file, got: {error}; copy it again") from error
    if name == _CONVERTER:
        return tensors
    adapter, part = (ENCODER, "encoder.") if name.startswith(ENCODER) else (DECODER, "decoder_model.model.")
    return {
        part + key.removeprefix(_PEFT_PREFIX).replace(".weight", f".{adapter}.weight"): tensor
        for key, tensor in tensors.items()
    }


def _verified(path: Path, digest: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"the adapter needs {path}, got: {error}; copy the whole folder again"
        ) from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise CheckpointError(
            f"{path} is not what config.json says was saved: truncated or edited; copy the whole folder again"
        )
    return content


def _fill(compressor: SoftCompressor, tensors: dict[str, Tensor], path: Path) -> None:
    wanted = dict(compressor.trained())
    if wanted.keys() != tensors.keys():
        differing = sorted(wanted.keys() ^ tensors.keys())[:3]
        raise CheckpointError(
            f"the adapter in {path} does not fit its config.json: {differing} ...; copy it again"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            if parameter.shape != tensors[name].shape or not torch.isfinite(tensors[name]).all():
                raise CheckpointError(
                    f"{name} of the adapter in {path} must be finite and of shape {tuple(parameter.shape)}, "
                    f"got shape {tuple(tensors[name].shape)} or NaN; copy or train it again"
                )
            parameter.data = tensors[name].to(parameter.device)


def _peft_config(compressor: SoftCompressor, name: str) -> bytes:
    config = compressor.config
    rank = config.encoder_rank if name == ENCODER else config.decoder_rank
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if name == DECODER else "FEATURE_EXTRACTION",
        "base_model_name_or_path": compressor.base_name,
        "r": rank,
        "lora_alpha": config.lora_scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(LORA_TARGETS),
        "layers_to_transform": list(range(config.encoder_layers))
        if name == ENCODER and config.encoder_layers
        else None,
        "inference_mode": True,
    }
    return (json.dumps(content, indent=1) + "\n").encode()
