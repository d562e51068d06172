"""Checkpoints in others' layouts: read like their authors run them, refused when they are not whole."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3Model,
)

from ctxcompress import Backbone, checkpoint
from ctxcompress.config import SoftConfig
from ctxcompress.errors import CheckpointError, ConfigError
from ctxcompress.foreign import (
    ForeignCompressor,
    export_merged,
    is_foreign,
    load_adapter,
    load_foreign,
    measured,
    resolve_adapter,
)
from ctxcompress.pooling import windows
from ctxcompress.soft import SoftCompressor

# PEFT's own wrapper, which only these tests use, asks transformers for a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

INNER = 40  # hidden units of the projector
TEXT = [(7 * place) % 390 + 5 for place in range(150)]
END, OWN, START = "<|end|>", "<|own|>", "<|memory_start|>"
CPU: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}


def sizes(hidden: int, tokens: int) -> dict[str, Any]:
    return {
        "vocab_size": tokens,
        "hidden_size": hidden,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


@pytest.fixture(scope="module")
def bases(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases: a Qwen3 without head (32 wide, window 64) and a Llama (48 wide).

    As Qwen3-Embedding's, the encoder's tokenizer appends a token that is not its end token.
    """
    folder = tmp_path_factory.mktemp("bases")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": [OWN, START, "<|memory_end|>"]})
    torch.manual_seed(1)
    config = LlamaConfig(**sizes(48, len(tokenizer)), tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    config = Qwen3Config(**sizes(32, len(tokenizer)), head_dim=8, tie_word_embeddings=True)
    Qwen3Model(config).save_pretrained(folder / "qwen")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {OWN}", special_tokens=[(OWN, tokenizer.convert_tokens_to_ids(OWN))]
    )
    tokenizer.save_pretrained(folder / "qwen")
    return folder


def random_adapter(model: Any, folder: Path, alpha: int) -> None:
    """A LoRA adapter as the authors train it, with noise in place of training."""
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules="all-linear", use_rslora=True)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)


@pytest.fixture(scope="module")
def sdcc(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdcc")
    torch.manual_seed(2)
    random_adapter(AutoModel.from_pretrained(bases / "qwen"), folder / "encoder", 32)
    random_adapter(AutoModelForCausalLM.from_pretrained(bases / "llama"), folder / "decoder", 16)
    projector = {
        "up_proj.weight": torch.randn(INNER, 32) * 0.2,
        "down_proj.weight": torch.randn(48, INNER) * 0.2,
        "rms_norm.weight": torch.rand(32) + 0.5,
    }
    head = {"weight": torch.randn(1, 32), "bias": torch.randn(1)}
    torch.save({"projector": projector, "compress_ratio_head": head}, folder / "projector.pth")
    settings = {
        "comp_ratio_or_len": [0.5, 0.25, 0.125],
        "placeholder_token_id": 9,
        "mlp_converter_hidden_dim": INNER,
        "feature_extract_method": "mean_pooling",
        "memory_token_begin_id": 300,
        "encoder_training": "lora",
        "decoder_training": "lora",
        "base_encoder_model_path": str(bases / "qwen"),
        "base_decoder_model_path": str(bases / "llama"),
        "discretize_ratio_mode": "round",
        "discretize_compare_in_log": False,
    }
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def lclm(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lclm")
    for base, role in (("qwen", "encoder"), ("llama", "decoder")):
        shutil.copytree(bases / base, folder / role)
    torch.manual_seed(3)
    adapter = {
        "norm.weight": torch.rand(32) + 0.5,
        "fc1.weight": torch.randn(48, 32) * 0.2,
        "fc1.bias": torch.randn(48),
        "fc2.weight": torch.randn(48, 48) * 0.2,
        "fc2.bias": torch.randn(48),
    }
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter" / "adapter.safetensors")
    settings = {
        "compression_ratio": 4,
        "encoder_window_size": 48,
        "pooling": "mean",
        "encoder_mask_type": "causal",
        "boundary_overlap": 0,
        "adapter_type": "mlp",
    }
    (folder / "model_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture
def own_sdcc(sdcc: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sdcc, tmp_path / "sdcc"))


@pytest.fixture
def own_lclm(lclm: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lclm, tmp_path / "lclm"))


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")


@torch.inference_mode()
def slow_states(model: Any, ids: list[int], causal: bool) -> Tensor:
    """(T, D) states of one text, in the plainest attention, with a mask written by hand."""
    mask = torch.zeros(1, 1, len(ids), len(ids))
    if causal:
        mask += torch.full_like(mask[0, 0], -1e30).triu(1)
    return model(torch.tensor([ids]), attention_mask=mask, use_cache=False).last_hidden_state[0]


def slow_encoder(base: Path, adapter: Path | None = None) -> Any:
    model = AutoModel.from_pretrained(base, attn_implementation="eager", dtype=torch.float32).eval()
    return PeftModel.from_pretrained(model, adapter).eval() if adapter else model


def slow_converter(mean_D: Tensor, norm_D: Tensor, up: Tensor, down: Tensor, *biases: Tensor) -> Tensor:
    normed_D = mean_D / (mean_D.square().mean() + 1e-6).sqrt() * norm_D
    first_bias, second_bias = biases or (0, 0)
    inner = up @ normed_D + first_bias
    return down @ (0.5 * inner * (1 + torch.erf(inner / 2**0.5))) + second_bias


def slow_sdcc(
    folder: Path, bases: Path, pieces: list[list[int]], ratio: int, causal: bool = False, unpooled: int = 0
) -> Tensor:
    """Soft tokens of one text whose windows end at each piece's end.

    Args:
        folder: the checkpoint.
        bases: folder of its base models.
        pieces: with their end tokens.
        ratio: tokens of a window.
        causal: mask of the encoder.
        unpooled: end tokens of all pieces but the last, which are read but not pooled.
    """
    encoder = slow_encoder(bases / "qwen", folder / "encoder")
    weights = torch.load(folder / "projector.pth", weights_only=True)["projector"]
    parts = [weights[f"{name}.weight"] for name in ("rms_norm", "up_proj", "down_proj")]
    soft = []
    for piece in pieces:
        states_TD = slow_states(encoder, piece, causal)
        tokens = len(piece) - (0 if piece is pieces[-1] else unpooled)
        cuts = [0, *range(tokens % ratio or ratio, tokens + 1, ratio)]
        soft += [
            slow_converter(states_TD[start:stop].mean(dim=0), *parts)
            for start, stop in itertools.pairwise(cuts)
        ]
    return torch.stack(soft)


def test_layouts_are_told_apart(sdcc: Path, lclm: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert [is_foreign(folder) for folder in (sdcc, lclm, tiny_model, tmp_path)] == [
        "sdcc",
        "lclm",
        None,
        None,
    ]


@pytest.mark.parametrize("method", ["mean_pooling", "mean_pooling_causal"])
def test_sdcc_equals_a_slow_computation(method: str, own_sdcc: Path, bases: Path) -> None:
    edit(own_sdcc / "config.json", feature_extract_method=method)
    compressor = load_foreign(own_sdcc, **CPU)
    tokenizer = AutoTokenizer.from_pretrained(bases / "llama")
    tail = tokenizer.convert_tokens_to_ids([OWN, END])
    # Lengths with their two end tokens: 15 = 7 + 8, 24 whole, 3: batched, padded, windows from the end.
    texts = [TEXT[:13], TEXT[20:42], TEXT[3:4]]
    causal = method.endswith("causal")
    for ratio in (2, 4, 8):
        for text, encoded in zip(texts, compressor.encode(texts, ratio), strict=True):
            got = compressor.soft_tokens(encoded, ratio)
            wanted = slow_sdcc(own_sdcc, bases, [[*text, *tail]], ratio, causal)
            assert (got.tokens, len(got)) == (len(text), windows(len(text) + 2, ratio))
            assert len(got) == compressor.size(len(text), ratio) == len(compressor.embedded(text, ratio))
            torch.testing.assert_close(got.embeddings_MD, wanted, rtol=1e-5, atol=1e-5)
    config = compressor.config
    assert (config.ratio_set, config.ratio_space, config.bidirectional) == ((2, 4, 8), "linear", not causal)


def test_sdcc_predicts_from_the_last_end_token(sdcc: Path, bases: Path) -> None:
    head = torch.load(sdcc / "projector.pth", weights_only=True)["compress_ratio_head"]
    tail = AutoTokenizer.from_pretrained(bases / "llama").convert_tokens_to_ids([OWN, END])
    last_D = slow_states(slow_encoder(bases / "qwen", sdcc / "encoder"), [*TEXT[:13], *tail], False)[-1]
    (encoded,) = load_foreign(sdcc, **CPU).encode([TEXT[:13]])
    assert encoded.log2_ratio == pytest.approx(float(head["weight"][0] @ last_D + head["bias"]), abs=1e-5)


def test_sdcc_long_texts_are_cut_so_that_they_pool_further(sdcc: Path, bases: Path) -> None:
    compressor = load_foreign(sdcc, **CPU)
    # The window of 64 has room for two end tokens and 62 tokens: pieces of 56 = 7 x 8. 150 tokens and two end
    # tokens are 40 + 56 + (54 + 2): the first piece is the short one, as the first window is.
    tail = AutoTokenizer.from_pretrained(bases / "llama").convert_tokens_to_ids([OWN, END])
    pieces = [[*TEXT[:40], tail[-1]], [*TEXT[40:96], tail[-1]], [*TEXT[96:150], *tail]]
    (finest,) = compressor.encode([TEXT])
    for ratio in (2, 4, 8):
        wanted = slow_sdcc(sdcc, bases, pieces, ratio, unpooled=1)
        (encoded,) = compressor.encode([TEXT], ratio)
        for again in (compressor.soft_tokens(encoded, ratio), compressor.soft_tokens(finest, ratio)):
            assert again.tokens == 150
            torch.testing.assert_close(again.embeddings_MD, wanted, rtol=1e-5, atol=1e-5)


def test_sdcc_end_tokens_are_a_choice(sdcc: Path, bases: Path) -> None:
    compressor = load_foreign(sdcc, **CPU, end_tokens=[7])
    (encoded,) = compressor.encode([TEXT[:10]], 4)
    got = compressor.soft_tokens(encoded, 4).embeddings_MD
    torch.testing.assert_close(got, slow_sdcc(sdcc, bases, [[*TEXT[:10], 7]], 4), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="end_tokens must be"):
        load_foreign(sdcc, **CPU, end_tokens=[])


def test_sdcc_decoder_wears_its_adapter(sdcc: Path, bases: Path) -> None:
    slow = AutoModelForCausalLM.from_pretrained(bases / "llama", attn_implementation="eager")
    slow = PeftModel.from_pretrained(slow, sdcc / "decoder").eval()
    compressor = load_foreign(sdcc, **CPU)
    ids = torch.tensor([TEXT[:20]])
    with torch.inference_mode():
        got, wanted = compressor.decoder.model(ids).logits, slow(ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    answer = compressor.decoder
    assert (answer.name, answer.tokenizer.eos_token) == (str(bases / "llama"), END)


def test_sdcc_static_and_old_names(own_sdcc: Path, sdcc: Path) -> None:
    new = load_foreign(sdcc, **CPU)
    settings = json.loads((own_sdcc / "config.json").read_text(encoding="utf-8"))
    old = {
        "num_doc_tokens": 0.125,
        "compress_method": "mean_pooling_by_ratio",
        "mlp_hidden_dim": INNER,
        "base_embed_model_path": settings["base_encoder_model_path"],
        "base_gen_model_path": settings["base_decoder_model_path"],
    }
    (own_sdcc / "config.json").write_text(json.dumps(old), encoding="utf-8")
    (own_sdcc / "encoder").rename(own_sdcc / "embed_model")
    (own_sdcc / "decoder").rename(own_sdcc / "gen_model")
    flat = torch.load(own_sdcc / "projector.pth", weights_only=True)["projector"]
    torch.save({f"projector.{key}": value for key, value in flat.items()}, own_sdcc / "projector.pth")
    static = load_foreign(own_sdcc, **CPU)
    (mine,), (theirs,) = static.encode([TEXT[:30]], 8), new.encode([TEXT[:30]], 8)
    assert torch.equal(static.soft_tokens(mine, 8).embeddings_MD, new.soft_tokens(theirs, 8).embeddings_MD)
    assert mine.log2_ratio == pytest.approx(3)  # no head: always log2(8)


def test_one_base_for_both_roles_is_there_once_and_stays_as_it_is(own_sdcc: Path, bases: Path) -> None:
    base = Backbone.from_pretrained(bases / "qwen", **CPU)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    shutil.rmtree(own_sdcc / "decoder")
    random_adapter(AutoModelForCausalLM.from_pretrained(bases / "qwen"), own_sdcc / "decoder", 16)
    content = torch.load(own_sdcc / "projector.pth", weights_only=True)
    content["projector"]["down_proj.weight"] = torch.randn(32, INNER)
    torch.save(content, own_sdcc / "projector.pth")
    query = "layers.0.self_attn.q_proj.base_layer.weight"
    compressor = load_foreign(own_sdcc, encoder=base, decoder=base, end_tokens=[7])
    named = load_foreign(own_sdcc, **CPU, encoder=bases / "qwen", decoder=bases / "qwen")
    for both in (compressor, named):
        assert both.encoder.get_parameter(query) is both.decoder_model.model.get_parameter(query)
    (encoded,) = compressor.encode([TEXT[:10]], 2)
    wanted = slow_sdcc(own_sdcc, bases, [[*TEXT[:10], 7]], 2)
    torch.testing.assert_close(compressor.soft_tokens(encoded, 2).embeddings_MD, wanted, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.model.state_dict().items())
    assert base.tokenizer.eos_token == compressor.decoder.tokenizer.eos_token == END


def test_lclm_equals_a_slow_computation(lclm: Path, bases: Path) -> None:
    compressor = load_foreign(lclm, **CPU)
    adapter = load_file(lclm / "adapter" / "adapter.safetensors")
    keys = ("norm.weight", "fc1.weight", "fc2.weight", "fc1.bias", "fc2.bias")
    parts, encoder = [adapter[key] for key in keys], slow_encoder(bases / "qwen")
    texts = [TEXT[:10], TEXT[:110]]  # 3 windows, the last of 2 tokens; and 12 + 12 + 4 of pieces 48 + 48 + 14
    for text, encoded in zip(texts, compressor.encode(texts), strict=True):
        wanted = []
        for start in range(0, len(text), 48):
            states_TD = slow_states(encoder, text[start : start + 48], causal=True)
            wanted += [slow_converter(part.mean(dim=0), *parts) for part in states_TD.split(4)]
        got = compressor.soft_tokens(encoded, 4)
        torch.testing.assert_close(got.embeddings_MD, torch.stack(wanted), rtol=1e-5, atol=1e-5)
        assert encoded.log2_ratio == 2
    ids = compressor.decoder.tokenizer.convert_tokens_to_ids([START, "<|memory_end|>"])
    assert compressor.around == ((ids[0],), (ids[1],))


def test_empty_texts(sdcc: Path, lclm: Path) -> None:
    theirs = load_foreign(sdcc, **CPU)
    (encoded,) = theirs.encode([[]], 4)
    assert (encoded.tokens, len(theirs.soft_tokens(encoded, 4))) == (0, 1)  # of the end tokens
    (encoded,) = load_foreign(lclm, **CPU).encode([[]])
    assert len(encoded.features.counts_BM) == 0


def damaged_projector(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = torch.load(folder / "projector.pth", weights_only=True)
        change(content)
        torch.save(content, folder / "projector.pth")

    return damage


def damaged_adapter(name: str, change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return damage


def pickled_adapter(folder: Path) -> None:
    file = folder / "encoder" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


QUERY = "base_model.model.layers.0.self_attn.q_proj.lora_A.weight"
ENCODER_FILE = "encoder/adapter_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            damaged_projector(lambda c: c["projector"].pop("rms_norm.weight")),
            "rms_norm.weight missing",
        ),
        (damaged_projector(lambda c: c["compress_ratio_head"].pop("bias")), "head.bias missing"),
        (
            damaged_projector(lambda c: c["projector"].update({"gate_proj.weight": torch.ones(INNER, 32)})),
            "gate_proj.weight unknown",
        ),
        (
            damaged_projector(lambda c: c["projector"].update({"up_proj.weight": torch.ones(INNER, 31)})),
            r"up_proj.weight .* shape \(40, 32\), got shape \(40, 31\)",
        ),
        (damaged_projector(lambda c: c["projector"]["up_proj.weight"].fill_(torch.nan)), "or NaN"),
        (lambda folder: torch.save([1, 2], folder / "projector.pth"), "tensors by name"),
        (lambda folder: torch.save(Path("code"), folder / "projector.pth"), "tensors and nothing else"),
        (lambda folder: (folder / "projector.pth").unlink(), "projector.pth must hold"),
        (damaged_adapter(ENCODER_FILE, lambda t: t.pop(QUERY)), "q_proj.lora_A.weight missing"),
        (damaged_adapter(ENCODER_FILE, lambda t: t.update({QUERY: torch.ones(3, 32)})), "got shape"),
        (pickled_adapter, r"pickles \(adapter_model.bin\) are not read"),
        (lambda folder: edit(folder / "encoder" / "adapter_config.json", use_dora=True), "use_dora"),
        (
            lambda folder: edit(folder / "encoder" / "adapter_config.json", target_modules=["c"]),
            "pass encoder=",
        ),
        (lambda folder: edit(folder / "config.json", feature_extract_method="last_tokens"), "last_tokens"),
        (lambda folder: edit(folder / "config.json", comp_ratio_or_len=32), "fractions to keep"),
        (
            lambda folder: edit(folder / "config.json", comp_ratio_or_len=[0.5, 0.33]),
            "multiple of the finest",
        ),
        (
            lambda folder: edit(folder / "config.json", base_encoder_model_path="/share/models/none"),
            "pass encoder=",
        ),
        (lambda folder: (folder / "config.json").write_text('{"comp_ratio_or_len": 0.5}'), "needs the key"),
    ],
)
def test_damaged_sdcc_is_refused(damage: Callable[[Path], Any], message: str, own_sdcc: Path) -> None:
    damage(own_sdcc)
    with pytest.raises(CheckpointError, match=message):
        load_foreign(own_sdcc, **CPU)


def pickled_model(folder: Path) -> None:
    file = folder / "encoder" / "model.safetensors"
    torch.save(load_file(file), folder / "encoder" / "pytorch_model.bin")
    file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged_adapter("adapter/adapter.safetensors", lambda t: t.pop("fc2.bias")), "fc2.bias missing"),
        (damaged_adapter("adapter/adapter.safetensors", lambda t: t["fc1.bias"].resize_(3)), "got shape"),
        (pickled_model, "pytorch_model.bin.*not read"),
        (lambda folder: (folder / "decoder" / "tokenizer.json").unlink(), "must hold tokenizer.json"),
        (lambda folder: shutil.rmtree(folder / "decoder"), "pass decoder="),
        (lambda folder: edit(folder / "model_config.json", encoder_mask_type="bidirectional"), "'causal'"),
        (lambda folder: edit(folder / "model_config.json", adapter_type="mlp_attn"), "'mlp'"),
        (lambda folder: edit(folder / "model_config.json", encoder_window_size=30), "divide the window"),
    ],
)
def test_damaged_lclm_is_refused(damage: Callable[[Path], Any], message: str, own_lclm: Path) -> None:
    damage(own_lclm)
    with pytest.raises(CheckpointError, match=message):
        load_foreign(own_lclm, **CPU)


def test_lclm_needs_its_control_tokens(own_lclm: Path, tiny_model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, own_lclm / "decoder" / name)
    with pytest.raises(CheckpointError, match="tokenizer must know"):
        load_foreign(own_lclm, **CPU)
    with pytest.raises(ConfigError, match="leave them out"):
        load_foreign(own_lclm, **CPU, end_tokens=[0])


def test_unknown_layouts_are_refused(tiny_model: Path) -> None:
    with pytest.raises(CheckpointError, match="got neither"):
        load_foreign(tiny_model)
    with pytest.raises(CheckpointError, match="OWNER/REPOSITORY"):
        load_foreign("nowhere")


@pytest.fixture
def trained(backbone: Backbone) -> SoftCompressor:
    """One of ours, with noise in place of training."""
    torch.manual_seed(4)
    compressor = SoftCompressor(backbone, SoftConfig(converter_size=16, encoder_rank=2, decoder_rank=4))
    for name, parameter in compressor.trained():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    compressor.finish()
    return compressor


@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_merged_decoder_equals_base_with_adapter(
    kind: str, trained: SoftCompressor, backbone: Backbone, sdcc: Path, tmp_path: Path
) -> None:
    compressor = trained if kind == "ours" else load_foreign(sdcc, **CPU)
    before = {name: tensor.clone() for name, tensor in compressor.state_dict().items()}
    untouched = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    export_merged(compressor, tmp_path / "merged")
    plain, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.tensor([TEXT[:30]])
    with torch.inference_mode():
        got, wanted = plain(ids).logits, compressor.decoder.model(ids).logits
        base = backbone.model(ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert kind == "theirs" or (got - base).abs().max() > 0.1  # the adapter does something
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("Rome")["input_ids"]
    assert not list((tmp_path / "merged").glob("adapter*"))
    assert compressor.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in compressor.state_dict().items())
    assert all(torch.equal(untouched[name], tensor) for name, tensor in backbone.model.state_dict().items())


# -------------------------------------------------------------------------------------- adapters by name


class Hub(ThreadingHTTPServer):
    """What the hub's client asks for to fetch a snapshot; holds commits of folders, the last one is main."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.tags: dict[str, str] = {}
        self.served: list[str] = []

    def push(self, repository: str, folder: Path, *, tag: str = "main") -> str:
        """Publish a folder, return the commit."""
        files = {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        commit = hashlib.sha1(
            b"".join(name.encode() + content for name, content in files.items())
        ).hexdigest()
        self.commits.setdefault(repository, {})[commit] = files
        self.tags |= {tag: commit, "main": commit}
        return commit


class HubHandler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.about("/".join(parts[2:4]), *parts[4:6])
        else:
            self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    do_HEAD = do_GET

    def about(self, repository: str, kind: str = "revision", revision: str = "main") -> None:
        commit, files = self.commit(repository, revision)
        if files is None:
            return
        listed = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
        ]
        siblings = [{"rfilename": name} for name in files]
        info = {"id": repository, "modelId": repository, "sha": commit, "siblings": siblings}
        self.send(200, json.dumps(listed if kind == "tree" else info).encode(), {})

    def file(self, repository: str, revision: str, name: str) -> None:
        commit, files = self.commit(repository, revision)
        if files is None:
            return
        if name not in files:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.server.served.append(name)
        tag = hashlib.sha1(files[name]).hexdigest()
        self.send(200, files[name], {"ETag": f'"{tag}"', "X-Repo-Commit": commit})

    def commit(self, repository: str, revision: str) -> tuple[str, dict[str, bytes] | None]:
        if repository not in self.server.commits:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return "", None
        commit = self.server.tags.get(revision, revision)
        files = self.server.commits[repository].get(commit)
        if files is None:
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        return commit, files

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(socket_enabled: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub of our own; the client has read its environment by now, so its settings are changed in place."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with Hub() as server:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        for name, value in {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def ours(trained: SoftCompressor, tmp_path: Path) -> Path:
    """A folder of our layout, with a few files that no adapter has."""
    folder = tmp_path / "ours"
    checkpoint.save(trained, folder, measured={"4": {"text": 0.5, "soft": 0.75}})
    for name in ("modeling.py", "pytorch_model.bin", "merged/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not fetched")
    return folder


def test_ours_loads_from_the_hub_and_then_from_its_cache(
    hub: Hub, ours: Path, trained: SoftCompressor, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("someone/ours", ours)
    first = load_adapter(backbone, "someone/ours")
    assert first.fingerprint == trained.fingerprint
    wanted = ["config.json", "README.md", *(name for name in checkpoint.FILES if (ours / name).exists())]
    assert sorted(hub.served) == sorted(wanted)
    folder = resolve_adapter("someone/ours")
    assert checkpoint.describe(folder) == checkpoint.describe(ours)
    assert measured(folder) == {"4": {"text": 0.5, "soft": 0.75}}
    assert len(hub.served) == len(wanted)
    hub.shutdown()
    hub.server_close()
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        assert load_adapter(backbone, "someone/ours").fingerprint == trained.fingerprint


def test_revisions_and_sub_folders(hub: Hub, ours: Path, trained: SoftCompressor, backbone: Backbone) -> None:
    several = ours.parent / "several"
    shutil.copytree(ours, several / "static" / "r=[4]")
    old = hub.push("someone/several", several, tag="v1")
    checkpoint.annotate(several / "static" / "r=[4]", {"8": {"text": 0.0, "soft": 1.0}})
    hub.push("someone/several", several)
    for name in ("someone/several@v1/static/r=[4]", f"someone/several@{old}/static/r=[4]"):
        assert measured(resolve_adapter(name)) == {"4": {"text": 0.5, "soft": 0.75}}
    newest = resolve_adapter("someone/several/static/r=[4]")
    assert measured(newest) == {"8": {"text": 0.0, "soft": 1.0}}
    assert load_adapter(backbone, newest).fingerprint == trained.fingerprint
    with pytest.raises(CheckpointError, match=r"'someone/several'.*name one: OWNER/REPOSITORY/SUB/FOLDER"):
        resolve_adapter("someone/several")


def test_theirs_loads_from_the_hub(hub: Hub, own_sdcc: Path, bases: Path, backbone: Backbone) -> None:
    for name in ("modeling.py", "encoder/old.bin", "encoder/optimizer.pth"):
        (own_sdcc / name).write_bytes(b"not fetched")
    hub.push("someone/theirs", own_sdcc)
    base = Backbone.from_pretrained(bases / "llama", **CPU)
    loaded = load_adapter(base, "someone/theirs")
    assert isinstance(loaded, ForeignCompressor)
    assert loaded.fingerprint == load_foreign(own_sdcc, **CPU).fingerprint
    assert "projector.pth" in hub.served
    assert not {"modeling.py", "encoder/old.bin", "encoder/optimizer.pth"} & set(hub.served)
    assert measured(resolve_adapter("someone/theirs")) == {}


def test_what_is_no_adapter_is_refused_before_its_weights_come(hub: Hub, tiny_model: Path) -> None:
    hub.push("someone/model", tiny_model)
    with pytest.raises(CheckpointError, match="'someone/model' must be an adapter"):
        resolve_adapter("someone/model")
    assert hub.served == ["config.json"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/nothing", "'someone/nothing'.*RepositoryNotFound.*spelling"),
        ("someone/ours@v9", "'someone/ours@v9'.*RevisionNotFound.*hf download someone/ours"),
        ("someone/ours/nowhere", "'someone/ours/nowhere' must be an adapter"),
    ],
)
def test_what_the_hub_does_not_have_is_named(hub: Hub, ours: Path, name: str, message: str) -> None:
    hub.push("someone/ours", ours)
    with pytest.raises(CheckpointError, match=message):
        resolve_adapter(name)


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_hub_both_remedies_are_named(
    hub: Hub, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(CheckpointError, match=r"'someone/ours'.*spelling.*hf download someone/ours"):
        resolve_adapter("someone/ours")


def test_a_download_that_broke_off_is_refused_offline(
    hub: Hub, ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("someone/ours", ours)
    folder = resolve_adapter("someone/ours")
    (folder / "converter.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="hf download someone/ours"):
        resolve_adapter("someone/ours")


def test_names_that_leave_the_snapshot_are_refused(hub: Hub, sdcc: Path, tmp_path: Path) -> None:
    commit = hub.push("someone/theirs", sdcc)
    hub.commits["someone/theirs"][commit]["encoder/../../../../outside.json"] = b"{}"
    with pytest.raises(CheckpointError, match="'someone/theirs@"):
        resolve_adapter("someone/theirs")
    assert not list(tmp_path.rglob("outside.json"))


@pytest.mark.parametrize(
    "name",
    [
        "nowhere",
        "./some/where",
        "../some/where",
        "/some/where",
        "~/some/where",
        "C:\\some\\where",
        "some/where/../else",
        "some//where",
        "some/where/",
        Path("some/where"),
    ],
    ids=str,
)
def test_paths_are_not_looked_up_on_the_hub(name: str | Path) -> None:
    with pytest.raises(CheckpointError, match="where there is no folder; check the path"):
        resolve_adapter(name)


def test_a_local_folder_is_no_name(
    ours: Path, sdcc: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ours.parent.parent)
    assert load_adapter(backbone, f"{ours.parent.name}/ours").fingerprint
    assert [measured(folder) for folder in (ours, sdcc)] == [{"4": {"text": 0.5, "soft": 0.75}}, {}]


# -------------------------------------------------------------------------------------- theirs on our base


def test_the_resident_base_wears_their_decoder(sdcc: Path, bases: Path) -> None:
    base = Backbone.from_pretrained(bases / "llama", **CPU)
    loaded = load_adapter(base, sdcc)
    query = "model.layers.0.self_attn.q_proj"
    worn = loaded.decoder_model.get_parameter(f"{query}.base_layer.weight")
    assert worn is base.model.get_parameter(f"{query}.weight")
    assert loaded.fingerprint == load_foreign(sdcc, **CPU).fingerprint


def test_whole_decoders_are_loaded_beside_the_base(lclm: Path, bases: Path, backbone: Backbone) -> None:
    # The tiny model's vocabulary is the start of theirs.
    loaded = load_adapter(backbone, lclm)
    assert loaded.decoder.name == str(lclm / "decoder")
    assert loaded.fingerprint == load_foreign(lclm, **CPU).fingerprint


@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_another_vocabulary_is_refused(role: str, own_lclm: Path, backbone: Backbone) -> None:
    file = own_lclm / role / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"the {role} of .* got another vocabulary"):
        load_adapter(backbone, own_lclm)


def test_another_known_model_is_refused(own_sdcc: Path, bases: Path) -> None:
    edit(own_sdcc / "config.json", base_decoder_model_path="/share/models/Qwen3-4B-Instruct-2507")
    base = Backbone.from_pretrained(bases / "llama", **CPU)
    assert load_adapter(base, own_sdcc).fingerprint  # a folder may have any name
    base.name = "Qwen/Qwen3-4B"
    with pytest.raises(CheckpointError, match="trained on Qwen/Qwen3-4B-Instruct-2507, got 'Qwen/Qwen3-4B'"):
        load_adapter(base, own_sdcc)
