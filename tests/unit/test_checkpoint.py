"""Adapters on disk: what was saved is what is loaded, and nothing else is accepted."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from ctxcompress import Backbone, checkpoint
from ctxcompress.config import SoftConfig
from ctxcompress.errors import CheckpointError
from ctxcompress.soft import SoftCompressor

SMALL = {"ratio_set": (2, 4, 8), "window": 32, "converter_size": 16, "encoder_rank": 4, "decoder_rank": 4}
IDS = [(7 * place) % 300 + 3 for place in range(45)]
FILES = {
    "encoder/adapter_model.safetensors",
    "encoder/adapter_config.json",
    "decoder/adapter_model.safetensors",
    "decoder/adapter_config.json",
    "converter.safetensors",
}


def made(backbone: Backbone, *, trainable: bool = True, **settings: Any) -> SoftCompressor:
    """A compressor whose adapters do something: fresh LoRA adds nothing."""
    torch.manual_seed(0)
    compressor = SoftCompressor(backbone, SoftConfig(**{**SMALL, **settings}))
    with torch.no_grad():
        for name, parameter in compressor.trained():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    compressor.finish(trainable=trainable)
    return compressor


def ratio_of(compressor: SoftCompressor) -> int:
    return compressor.config.ratio_set[-1]


def soft_of(compressor: SoftCompressor) -> torch.Tensor:
    ratio = ratio_of(compressor)
    return compressor.soft_tokens(compressor.encode([IDS], ratio)[0], ratio).embeddings_MD


@pytest.fixture(scope="module")
def saved(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    checkpoint.save(made(backbone), folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


@pytest.fixture
def plain_model(tiny_model: Path) -> LlamaForCausalLM:
    """The base as transformers alone loads it."""
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


# -------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="default"),
        pytest.param({"encoder_layers": 2, "bidirectional": False}, id="two causal layers"),
        pytest.param({"features": "compression_tokens"}, id="learned tokens"),
        pytest.param({"decoder_rank": 0, "residual": False}, id="no decoder adapter"),
        pytest.param({"lora_scale": 0.3, "features": "last_tokens"}, id="another scale"),
    ],
)
@pytest.mark.parametrize("trainable", [True, False])
def test_loading_gives_back_what_was_saved(
    backbone: Backbone, tmp_path: Path, settings: dict[str, Any], trainable: bool
) -> None:
    before = made(backbone, trainable=trainable, **settings)
    checkpoint.save(before, tmp_path)
    after = checkpoint.load(backbone, tmp_path, trainable=trainable)
    assert after.config == before.config
    assert after.fingerprint == before.fingerprint
    theirs = dict(before.trained())
    ours = dict(after.trained())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name
        assert (parameter.dtype, parameter.requires_grad) == (torch.float32, trainable)
    assert torch.equal(soft_of(after), soft_of(before))


def test_saving_twice_writes_the_same_bytes(backbone: Backbone, saved: Path, tmp_path: Path) -> None:
    checkpoint.save(checkpoint.load(backbone, saved, trainable=True), tmp_path)
    for path in saved.rglob("*"):
        if path.is_file():
            assert (tmp_path / path.relative_to(saved)).read_bytes() == path.read_bytes(), path


def test_a_bfloat16_file_loads_into_either_dtype(backbone: Backbone, tmp_path: Path) -> None:
    compressor = made(backbone)
    checkpoint.save(compressor, tmp_path, dtype=torch.bfloat16)
    loaded = checkpoint.load(backbone, tmp_path, trainable=True)
    for (name, before), (_, after) in zip(compressor.trained(), loaded.trained(), strict=True):
        assert torch.equal(after, before.bfloat16().float()), name
    # The fingerprint looks at bfloat16 values, so the smaller file reads the same soft tokens.
    assert loaded.fingerprint == compressor.fingerprint


def test_what_a_folder_holds(backbone: Backbone, saved: Path) -> None:
    found = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert found == FILES | {"config.json", "README.md"}
    description = checkpoint.describe(saved)
    assert description["format"] == checkpoint.FORMAT
    assert description["base"] == {"name": backbone.name, "fingerprint": backbone.fingerprint}
    for name, digest in description["files"].items():
        assert hashlib.sha256((saved / name).read_bytes()).hexdigest() == digest
    assert description["files"].keys() == FILES


def test_card_and_measurements_are_kept(backbone: Backbone, tmp_path: Path) -> None:
    measured = {"8": {"soft": 0.5, "text": 0.25}}
    stage = {
        "recipe": {"seed": 3, "texts": ["a.jsonl"]}, "notice": "Text from A, CC0.", "machine": "a CPU",
        "steps": 10, "samples": 320, "seconds": 120.0, "date": "2026-01-02", "losses": {"answer at 4": 1.25},
    }  # fmt: skip
    checkpoint.save(made(backbone), tmp_path, training=[stage])
    checkpoint.annotate(tmp_path, measured)
    described, card = checkpoint.describe(tmp_path), (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (described["measured"], described["training"]) == (measured, [stage])
    for line in (
        "320 samples in 10 steps, 2.0 minutes on a CPU",
        "seed 3",
        "answer at 4 1.25",
        "CC0",
        "| 8 | 25.0 % | 50.0 % |",
    ):
        assert line in card
    checkpoint.load(backbone, tmp_path)


def test_the_card_names_the_base(backbone: Backbone, saved: Path) -> None:
    assert f"base_model: {backbone.name}" in (saved / "README.md").read_text(encoding="utf-8")


# -------------------------------------------------------------------------------------- plain PEFT

# PEFT asks transformers for an attribute by its old name; nothing to mend on our side.
old_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@old_name
@pytest.mark.parametrize("lora_scale", [2.0, 0.3])
def test_plain_peft_reads_the_decoder(
    backbone: Backbone, plain_model: LlamaForCausalLM, tmp_path: Path, lora_scale: float
) -> None:
    compressor = made(backbone, trainable=False, lora_scale=lora_scale)
    checkpoint.save(compressor, tmp_path)
    with torch.no_grad():
        before = plain_model(torch.tensor([IDS])).logits
        peft_model = PeftModel.from_pretrained(plain_model, tmp_path / "decoder")
        theirs = peft_model(torch.tensor([IDS])).logits
        ours = compressor.decoder.model(torch.tensor([IDS])).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, ours, atol=1e-2)


@old_name
@pytest.mark.parametrize("layers", [2, None])
def test_plain_peft_reads_the_encoder(
    backbone: Backbone, plain_model: LlamaForCausalLM, tmp_path: Path, layers: int | None
) -> None:
    compressor = made(backbone, trainable=False, encoder_layers=layers)
    checkpoint.save(compressor, tmp_path)
    seen = torch.ones(1, 1, len(IDS), len(IDS), dtype=torch.bool)
    peft_model = PeftModel.from_pretrained(plain_model, tmp_path / "encoder")
    trunk = peft_model.base_model.model.model
    # The same first layers of the whole model, and its final norm.
    trunk.layers = trunk.layers[: layers or 3]
    with torch.no_grad():
        theirs = trunk(torch.tensor([IDS]), attention_mask=seen, use_cache=False).last_hidden_state
        ours = compressor.encoder(torch.tensor([IDS]), attention_mask=seen, use_cache=False).last_hidden_state
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------- refusals


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change `config.json`."""
    path = folder / "config.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    change(description)
    path.write_text(json.dumps(description), encoding="utf-8")


def rewritten(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a tensor file and the hash that vouches for it."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    edited(folder, lambda description: description["files"].update({name: digest}))


def refused(backbone: Backbone, folder: Path, message: str, remedy: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(backbone, folder)
    assert remedy in str(caught.value)


def test_another_base_is_refused(tiny_model: Path, saved: Path) -> None:
    torch.manual_seed(1)
    base = Backbone.from_pretrained(tiny_model, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        base.model.lm_head.weight[0, 0] += 1
    refused(base, saved, "was trained on .* got", "load that base, or train an adapter for this one")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_is_refused(backbone: Backbone, copied: Path, version: object) -> None:
    edited(copied, lambda description: description.update(format=version))
    refused(backbone, copied, f"has format {version}, this version reads 1", "update ctxcompress")


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(backbone: Backbone, copied: Path, name: str) -> None:
    (copied / name).unlink()
    refused(backbone, copied, f"needs .*{name}", "copy the whole folder again")


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_truncated_file_is_refused(backbone: Backbone, copied: Path, name: str) -> None:
    (copied / name).write_bytes((copied / name).read_bytes()[:-7])
    refused(backbone, copied, f"{name} is not what config.json says", "copy the whole folder again")


@pytest.mark.parametrize("name", sorted(FILES))
def test_an_edited_file_is_refused(backbone: Backbone, copied: Path, name: str) -> None:
    content = bytearray((copied / name).read_bytes())
    content[-1] ^= 1
    (copied / name).write_bytes(content)
    refused(backbone, copied, f"{name} is not what config.json says", "copy the whole folder again")


def test_a_file_that_is_no_safetensors_is_refused(backbone: Backbone, copied: Path) -> None:
    (copied / "converter.safetensors").write_bytes(b"pickle")
    digest = hashlib.sha256(b"pickle").hexdigest()
    edited(copied, lambda description: description["files"].update({"converter.safetensors": digest}))
    refused(backbone, copied, "must be a safetensors file", "copy it again")


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", sorted(name for name in FILES if name.endswith("safetensors")))
def test_numbers_that_are_none_are_refused(
    backbone: Backbone, copied: Path, name: str, broken: float
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[min(tensors)].view(-1)[-1] = broken

    rewritten(copied, name, spoil)
    refused(backbone, copied, "must be finite", "copy or train it again")


def test_another_shape_is_refused(backbone: Backbone, copied: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors["converter.up.weight"] = torch.zeros(17, 32)

    rewritten(copied, "converter.safetensors", widen)
    refused(
        backbone, copied, r"converter.up.weight .* shape \(16, 32\), got shape \(17, 32\)", "train it again"
    )


@pytest.mark.parametrize("change", ["extra", "missing"])
def test_wrong_tensors_are_refused(backbone: Backbone, copied: Path, change: str) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        scale = tensors.pop("converter.scale")
        if change == "extra":
            tensors |= {"converter.scale": scale, "converter.gate": scale.clone()}

    rewritten(copied, "converter.safetensors", spoil)
    name = "converter.gate" if change == "extra" else "converter.scale"
    refused(backbone, copied, f"does not fit its config.json: .*{name}", "copy it again")


@pytest.mark.parametrize(
    "settings",
    [
        {"encoder_layers": 2},
        {"encoder_layers": 9},
        {"encoder_rank": 8},
        {"decoder_rank": 0},
        {"converter_size": 8},
        {"features": "compression_tokens"},
        {"features": "magic"},
        {"ratio_set": [3, 2]},
        {"ratio_set": "2"},
        {"unknown": 1},
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(
    backbone: Backbone, copied: Path, settings: dict[str, Any]
) -> None:
    edited(copied, lambda description: description["compressor"].update(settings))
    with pytest.raises(CheckpointError):
        checkpoint.load(backbone, copied)


def test_a_list_without_one_of_the_files_is_refused(backbone: Backbone, copied: Path) -> None:
    edited(copied, lambda description: description["files"].pop("converter.safetensors"))
    refused(backbone, copied, "does not fit its config.json: .*converter", "copy it again")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/dev/null", "modeling.py", "decoder/more.json"])
def test_files_that_no_adapter_has_are_refused(backbone: Backbone, copied: Path, name: str) -> None:
    edited(copied, lambda description: description["files"].update({name: "0" * 64}))
    refused(backbone, copied, f"files of an adapter only, got .*{name}", "copy the whole folder again")


@pytest.mark.parametrize("key", ["format", "base", "compressor", "files"])
def test_a_config_without_a_part_is_refused(backbone: Backbone, copied: Path, key: str) -> None:
    edited(copied, lambda description: description.pop(key))
    refused(backbone, copied, "an adapter folder with a config.json was expected", "check the path")


@pytest.mark.parametrize("key", ["name", "fingerprint"])
def test_a_base_without_its_particulars_is_refused(tiny_model: Path, copied: Path, key: str) -> None:
    # The name is only needed for the message about another base, so that is the base to try.
    base = Backbone.from_pretrained(tiny_model, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        base.model.lm_head.weight[0, 0] += 1
    edited(copied, lambda description: description["base"].pop(key))
    with pytest.raises(CheckpointError):
        checkpoint.load(base, copied)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model_type": "llama"}'])
def test_another_config_is_refused(backbone: Backbone, copied: Path, content: bytes) -> None:
    (copied / "config.json").write_bytes(content)
    refused(backbone, copied, "an adapter folder with a config.json was expected", "check the path")


def test_no_folder_is_refused(backbone: Backbone, saved: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere", saved / "README.md"):
        refused(backbone, folder, "an adapter folder with a config.json was expected", "check the path")


def test_a_base_that_is_too_shallow_is_refused(backbone: Backbone, copied: Path) -> None:
    edited(copied, lambda description: description["compressor"].update(encoder_layers=4))
    refused(backbone, copied, "needs 4 layers", "choose a base with more")
