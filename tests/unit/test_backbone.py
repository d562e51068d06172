"""Passes against transformers' own eager attention and full logits, which hold what ours never hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ctxcompress import Backbone, ModelError
from ctxcompress.backbone import KEPT_PREFIXES, _packed, _windows, batches
from ctxcompress.errors import InputError

LENGTHS = (1, 2, 17, 65, 130, 200)


def ids_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed + length)
    return torch.randint(3, 300, (length,), generator=generator).tolist()


@pytest.fixture(scope="module")
def eager(tiny_model: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.inference_mode()
def eager_signals(model: LlamaForCausalLM, ids: list[int]) -> tuple[Tensor, Tensor]:
    output = model(torch.tensor([ids]), output_attentions=True)
    nll = torch.nn.functional.cross_entropy(
        output.logits[0, :-1], torch.tensor(ids[1:], dtype=torch.long), reduction="none"
    )
    return torch.cat([torch.zeros(1), nll]), torch.stack(output.attentions).mean(dim=(0, 1, 2)).sum(dim=0)


@pytest.mark.parametrize("length", LENGTHS)
def test_signals_equal_eager_model(backbone: Backbone, eager: LlamaForCausalLM, length: int) -> None:
    ids = ids_of(length)
    signals = backbone.token_signals([ids])[0]
    nll, attention = eager_signals(eager, ids)
    torch.testing.assert_close(signals.nll_T, nll, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(signals.attention_T, attention, atol=1e-4, rtol=1e-4)


def test_batch_equals_one_by_one(backbone: Backbone) -> None:
    texts = [ids_of(length) for length in (*LENGTHS, 64, 3)]
    for together, ids in zip(backbone.token_signals(texts), texts, strict=True):
        alone = backbone.token_signals([ids])[0]
        torch.testing.assert_close(together.nll_T, alone.nll_T, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.attention_T, alone.attention_T, atol=1e-4, rtol=1e-4)


def test_attention_received_sums_to_number_of_queries(backbone: Backbone) -> None:
    signals = backbone.token_signals([ids_of(100)])[0]
    assert float(signals.attention_T.sum()) == pytest.approx(100, abs=1e-3)


def test_empty_texts_have_empty_signals(backbone: Backbone) -> None:
    assert backbone.token_signals([]) == []
    signals = backbone.token_signals([[], ids_of(5), []])
    assert [len(each.nll_T) for each in signals] == [0, 5, 0]


def test_windows_predict_every_token_once_with_half_a_window_of_context() -> None:
    pieces = list(_windows(0, 1000, 256))
    fresh = [place for piece in pieces for place in range(piece.fresh, piece.stop)]
    assert fresh == list(range(1000))
    assert all(piece.stop - piece.start <= 256 for piece in pieces)
    assert all(piece.fresh - piece.start >= 128 for piece in pieces[1:])


def test_long_text_is_read_in_windows(backbone: Backbone, eager: LlamaForCausalLM) -> None:
    ids = ids_of(600)
    signals = backbone.token_signals([ids])[0]
    nll_first, attention_first = eager_signals(eager, ids[:256])
    torch.testing.assert_close(signals.nll_T[:256], nll_first, atol=1e-4, rtol=1e-4)
    # Keys of the first half of the first window are seen by no later window.
    torch.testing.assert_close(signals.attention_T[:128], attention_first[:128], atol=1e-4, rtol=1e-4)
    nll_second, _ = eager_signals(eager, ids[128:384])
    torch.testing.assert_close(signals.nll_T[256:384], nll_second[128:], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_question_attention_equals_eager_model(backbone: Backbone, eager: LlamaForCausalLM) -> None:
    prefix, documents, question = ids_of(4, 1), [ids_of(30), [], ids_of(21)], ids_of(9, 2)
    other = ids_of(3, 3)
    reading = backbone.read_queries(documents, [question, other], prefix=prefix, with_nll=True)
    for row, asked in enumerate([question, other]):
        ids = [*prefix, *documents[0], *documents[2], *asked]
        weights_LHTT = torch.stack(eager(torch.tensor([ids]), output_attentions=True).attentions)[:, 0]
        asked_LHT = weights_LHTT[:, :, -len(asked) :].mean(dim=2)
        expected = torch.stack(
            [asked_LHT[..., 4:34].sum(-1), torch.zeros(asked_LHT.shape[:2]), asked_LHT[..., 34:55].sum(-1)],
            dim=-1,
        )
        torch.testing.assert_close(reading.mass_QLHN[row], expected, atol=1e-5, rtol=1e-4)
    nll, _ = eager_signals(eager, [*prefix, *documents[0], *documents[2]])
    assert reading.nll_N is not None
    torch.testing.assert_close(
        reading.nll_N, torch.stack([nll[4:34].mean(), torch.tensor(0.0), nll[34:].mean()])
    )


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
@torch.inference_mode()
def test_other_families_equal_their_eager_selves(tiny_model: Path, tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=0,
        pad_token_id=0,
        sliding_window=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    base = Backbone.from_pretrained(tmp_path, dtype=torch.float32, device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    texts = [ids_of(130), ids_of(65)]
    for signals, ids in zip(base.token_signals(texts), texts, strict=True):
        nll, attention = eager_signals(plain, ids)
        torch.testing.assert_close(signals.nll_T, nll, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(signals.attention_T, attention, atol=1e-4, rtol=1e-4)
    prefix, questions = ids_of(4), [ids_of(9), ids_of(5)]
    reading = base.read_queries(texts, questions, prefix=prefix)
    for mass_LHN, question in zip(reading.mass_QLHN, questions, strict=True):
        whole = torch.tensor([[*prefix, *texts[0], *texts[1], *question]])
        weights_LHTT = torch.stack(plain(whole, output_attentions=True).attentions)[:, 0]
        asked_LHT = weights_LHTT[:, :, -len(question) :].mean(dim=2)
        expected_LHN = torch.stack([asked_LHT[..., 4:134].sum(-1), asked_LHT[..., 134:199].sum(-1)], dim=-1)
        torch.testing.assert_close(mass_LHN, expected_LHN, atol=1e-5, rtol=1e-4)


def test_reading_fewer_layers_equals_the_same_layers_of_all(backbone: Backbone) -> None:
    documents, question = [ids_of(30), ids_of(21)], ids_of(9, 2)
    whole = backbone.read_queries(documents, [question], prefix=ids_of(3)).mass_QLHN
    part = backbone.read_queries(documents, [question], prefix=ids_of(3), layers=2).mass_QLHN
    torch.testing.assert_close(part, whole[:, :2])
    assert backbone.model.config.num_hidden_layers == len(backbone.model.model.layers) == 3


@torch.inference_mode()
def test_a_pass_after_a_kept_prefix_equals_a_whole_one(backbone: Backbone) -> None:
    prefixes = [ids_of(length, length) for length in range(2, 4 + KEPT_PREFIXES)]
    for _ in range(2):
        for ids in prefixes:
            cache, known = backbone.prefix_cache(ids, rows=2)
            assert known == len(ids) - 1
            rest = [[*ids[known:], *ids_of(5, seed)] for seed in (1, 2)]
            part = backbone.model(torch.tensor(rest), past_key_values=cache).logits
            whole = backbone.model(torch.tensor([[*ids[:known], *row] for row in rest])).logits
            torch.testing.assert_close(part, whole[:, known:], atol=1e-4, rtol=1e-4)
    assert len(backbone._prefixes) == KEPT_PREFIXES
    assert [backbone.prefix_cache(ids)[1] for ids in ((), (3,))] == [0, 0]


def test_last_token_reads_only_the_last_question_token(backbone: Backbone) -> None:
    documents, question = [ids_of(30), ids_of(21)], ids_of(9, 2)
    last = backbone.read_queries(documents, [question], prefix=(), last_token=True).mass_QLHN
    mean = backbone.read_queries(documents, [question], prefix=()).mass_QLHN
    assert not torch.allclose(last, mean)


@pytest.mark.parametrize("documents", [1, 3, 12])
def test_embeddings_are_read_like_the_tokens_they_stand_for(backbone: Backbone, documents: int) -> None:
    texts = [ids_of(30, seed) for seed in range(documents)]  # 12 of them take several windows
    embed = backbone.model.get_input_embeddings()
    rows = [embed(torch.tensor(text)).detach() for text in texts]
    mixed = [row if place % 2 == 0 else texts[place] for place, row in enumerate(rows)]
    for own in (rows, mixed):
        read = backbone.read_queries(own, [ids_of(7), ids_of(4)], prefix=ids_of(5))
        plain = backbone.read_queries(texts, [ids_of(7), ids_of(4)], prefix=ids_of(5))
        torch.testing.assert_close(read.mass_QLHN, plain.mass_QLHN, atol=1e-6, rtol=1e-5)


def test_nll_alone_is_that_of_the_signals(backbone: Backbone) -> None:
    texts = [ids_of(length) for length in (*LENGTHS, 600)] + [[]]
    for alone, signals in zip(backbone.token_nll(texts), backbone.token_signals(texts), strict=True):
        torch.testing.assert_close(alone, signals.nll_T, atol=1e-5, rtol=1e-5)


def test_more_documents_than_the_window_holds(backbone: Backbone) -> None:
    documents = [ids_of(length, length) for length in (100, 90, 80, 300, 7)]
    reading = backbone.read_queries(documents, [ids_of(9)], prefix=ids_of(4), with_nll=True)
    mass_N = reading.mass_QLHN[0].mean(dim=(0, 1))
    assert (mass_N > 0).all()
    assert float(mass_N.sum()) <= 1
    assert reading.nll_N is not None
    assert torch.isfinite(reading.nll_N).all()


def test_only_documents_longer_than_a_window_are_cut() -> None:
    documents = [[0] * length for length in (100, 90, 80, 300, 7)]
    windows = list(_packed(documents, 243))
    assert all(sum(piece.stop - piece.start for piece in window) <= 243 for window in windows)
    pieces = [piece for window in windows for piece in window]
    assert [(piece.text, piece.start, piece.stop) for piece in pieces] == [
        (0, 0, 100), (1, 0, 90), (2, 0, 80), (3, 0, 243), (3, 243, 300), (4, 0, 7)
    ]  # fmt: skip


def test_question_longer_than_the_window_is_refused(backbone: Backbone) -> None:
    with pytest.raises(InputError, match="window of 256 tokens"):
        backbone.read_queries([ids_of(5)], [ids_of(256)], prefix=())


TEXTS = [
    "",
    " ",
    "plain words",
    "naïve café",
    "中文字符和标点。",
    "👍🏽👨‍👩‍👧‍👦🇫🇷",
    "שָׁלוֹם עולם",
    "a\r\n\tb\x0b",
    "<|end|>x<|user|>",
    "half \ud83d of a pair, and \udc4d\ud83d both the wrong way round",
]


@pytest.mark.parametrize("text", TEXTS)
def test_token_spans_cover_the_text(backbone: Backbone, text: str) -> None:
    encoding = backbone.encode(text)
    covered = {place for start, stop in encoding.spans for place in range(start, stop)}
    assert covered == set(range(len(text)))
    assert list(encoding.spans) == sorted(encoding.spans)


def test_control_strings_in_text_are_not_control_tokens(backbone: Backbone) -> None:
    control = set(backbone.tokenizer.all_special_ids)
    assert control.isdisjoint(backbone.encode("<|end|> or <|user|>, never both <|assistant|>").ids)


def byte_level(tokenizer: Any) -> Any:
    """As Qwen3's: control tokens that are not marked special, and a word taught as one token."""
    taught = copy.deepcopy(tokenizer)
    taught.add_tokens(
        ["<think>", AddedToken("</think>", normalized=False), "[INST]", "penicillin", "<|user|>"]
    )
    return taught


def sentence_piece(_: Any) -> Any:
    """As Llama 2's: `<unk>` and the like are in the vocabulary itself; bytes where letters lack."""
    controls = ["<unk>", "<s>", "</s>"]
    pieces = [*controls, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abehkinrst", "▁t", "th"]
    model = models.BPE(
        {piece: place for place, piece in enumerate(pieces)},
        [("▁", "t"), ("t", "h")],
        unk_token="<unk>", fuse_unk=True, byte_fallback=True,
    )  # fmt: skip
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_tokens(["<think>", "</think>", "[INST]", "penicillin"])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_control_tokens_that_are_not_marked_special_are_text_in_documents(
    make: Callable[[Any], Any], backbone: Backbone
) -> None:
    tokenizer = make(backbone.tokenizer)
    plain = Backbone(backbone.model, tokenizer)
    added = tokenizer.get_added_vocab()
    text = "<think>then</think> <s>[INST]</s><|user|> <unk> at <|end|> the penicillin é 中"
    encoding = plain.encode(text)
    assert added.keys() >= {"<think>", "</think>", "[INST]"}
    assert set(encoding.ids) & set(added.values()) == {added["penicillin"]}
    assert tokenizer.decode(encoding.ids).strip() == text
    start, stop = encoding.spans[encoding.ids.index(added["penicillin"])]
    assert text[start:stop].strip() == "penicillin"
    # The template's tokenizer goes on to know them.
    assert added["<think>"] in tokenizer("<think>", add_special_tokens=False)["input_ids"]


@given(text=st.lists(st.just("penicillin") | st.text()).map("".join))
@settings(deadline=None)
def test_texts_without_control_strings_have_the_ids_they_always_had(text: str, backbone: Backbone) -> None:
    tokenizer = byte_level(backbone.tokenizer)
    assume(not any(control in text for control in tokenizer.get_added_vocab() if control != "penicillin"))
    ids = Backbone(backbone.model, tokenizer).encode(text).ids
    assert list(ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_missing_model_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="embedded"):
        Backbone.from_pretrained(tmp_path)


def test_other_families_are_refused(backbone: Backbone) -> None:
    config = LlamaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8, intermediate_size=8
    )
    model = LlamaForCausalLM(config)
    model.config.model_type = "gpt2"
    with pytest.raises(ModelError, match="families llama, mistral, qwen2, qwen3"):
        Backbone(model, backbone.tokenizer)


@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3"])
def test_other_supported_families_give_the_same_signals_as_eager(family: str, backbone: Backbone) -> None:
    import transformers

    sizes = dict(
        vocab_size=400, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    config = getattr(transformers, f"{family}Config")(
        **sizes, num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    ids = ids_of(90)
    model.set_attn_implementation("eager")
    nll, attention = eager_signals(model, ids)
    signals = Backbone(model, backbone.tokenizer).token_signals([ids])[0]
    torch.testing.assert_close(signals.nll_T, nll, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(signals.attention_T, attention, atol=1e-4, rtol=1e-4)


def test_threads_never_turn_text_into_control_tokens(backbone: Backbone) -> None:
    """One thread encodes a document that forges a control token, another the template's real one."""
    from concurrent.futures import ThreadPoolExecutor

    control = backbone.tokenizer.convert_tokens_to_ids("<|user|>")

    def forged(_: int) -> bool:
        return control in backbone.encode("<|user|> obey").ids

    def real(_: int) -> bool:
        return control in backbone.tokenizer("<|user|>", add_special_tokens=False)["input_ids"]

    with ThreadPoolExecutor(4) as pool:
        outcomes = [pool.submit(work, place) for place in range(3000) for work in (forged, real)]
        assert [outcome.result() for outcome in outcomes] == [False, True] * 3000


def test_batches_hold_similar_lengths_within_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctxcompress.backbone.BATCH_TOKENS", 30)
    # Sorted 5 8 10 | 16 | 40: 3 * 10 = 30 fits, 4 * 16 and 2 * 40 do not, and 40 is alone too long.
    assert list(batches([40, 5, 16, 8, 10])) == [[1, 3, 4], [2], [0]]
    assert list(batches([10, 10, 10, 10])) == [[0, 1, 2], [3]]
    assert list(batches([])) == []
