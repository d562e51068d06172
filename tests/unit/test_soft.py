"""The soft compressor on the tiny model: what its encoder sees, what batches change, what is shared."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctxcompress import Backbone
from ctxcompress.config import SoftConfig
from ctxcompress.errors import CheckpointError, InputError
from ctxcompress.pooling import windows
from ctxcompress.selector import Selection
from ctxcompress.soft import EncodedText, SoftCompressor

SMALL = {"ratio_set": (2, 4, 8), "window": 32, "converter_size": 16, "encoder_rank": 4, "decoder_rank": 4}
LENGTHS = (0, 1, 2, 7, 8, 9, 31, 32, 33, 70)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

all_features = pytest.mark.parametrize("features", ["mean_pool", "last_tokens", "compression_tokens"])


def text_of(tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed + tokens)
    return torch.randint(3, 300, (tokens,), generator=generator).tolist()


TEXTS = [text_of(length) for length in LENGTHS]


def unfinished(backbone: Backbone, kind: type[SoftCompressor] = SoftCompressor, **settings: Any) -> Any:
    """A compressor whose adapters do something: fresh LoRA adds nothing."""
    torch.manual_seed(0)
    compressor = kind(backbone, SoftConfig(**{**SMALL, **settings}))
    with torch.no_grad():
        for name, parameter in compressor.trained():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return compressor


def made(backbone: Backbone, *, trainable: bool = False, **settings: Any) -> SoftCompressor:
    compressor: SoftCompressor = unfinished(backbone, **settings)
    compressor.finish(trainable=trainable)
    return compressor


def same(one: EncodedText, other: EncodedText) -> None:
    assert (one.tokens, one.ratio) == (other.tokens, other.ratio)
    assert one.features.counts_BM.tolist() == other.features.counts_BM.tolist()
    torch.testing.assert_close(one.features.states_BMD, other.features.states_BMD, **CLOSE)
    torch.testing.assert_close(one.features.embeddings_BMD, other.features.embeddings_BMD, **CLOSE)
    assert one.log2_ratio == pytest.approx(other.log2_ratio, abs=1e-4)


def first_state(compressor: SoftCompressor, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return compressor.read([ids], compressor.config.ratio_set[:1])[0].states_BMD[0, 0]


# ------------------------------------------------------------------------------------------- encoding


@all_features
@pytest.mark.parametrize("ratio", [2, 8])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="default"),
        pytest.param({"bidirectional": False}, id="causal"),
        pytest.param({"pool_end_token": True}, id="end token pooled"),
        pytest.param({"window_alignment": "end"}, id="windows from the end"),
        pytest.param({"encoder_layers": 1}, id="one layer"),
    ],
)
def test_a_batch_is_its_texts_one_by_one(
    backbone: Backbone, features: str, ratio: int, settings: dict[str, Any]
) -> None:
    compressor = made(backbone, features=features, **settings)
    for together, ids in zip(compressor.encode(TEXTS, ratio), TEXTS, strict=True):
        same(together, compressor.encode([ids], ratio)[0])
        assert together.tokens == len(ids)
        assert (together.features.counts_BM > 0).all()


@all_features
@pytest.mark.parametrize("alignment", ["start", "end"])
def test_texts_of_one_pass_have_ratios_of_their_own(
    backbone: Backbone, features: str, alignment: str
) -> None:
    compressor = made(backbone, features=features, window_alignment=alignment)
    texts, ratios = [text_of(20), text_of(9), text_of(31), text_of(1), text_of(30)], [8, 2, 4, 2, 8]
    found, log2_B = compressor.read(texts, ratios)
    for row, (ids, ratio) in enumerate(zip(texts, ratios, strict=True)):
        alone, log2_1 = compressor.read([ids], [ratio])
        count = windows(len(ids), ratio)
        assert found.counts_BM[row, :count].tolist() == alone.counts_BM[0].tolist()
        assert found.counts_BM[row, count:].sum() == 0
        for together, own in (
            (found.states_BMD, alone.states_BMD),
            (found.embeddings_BMD, alone.embeddings_BMD),
        ):
            torch.testing.assert_close(together[row, :count], own[0], **CLOSE)
        torch.testing.assert_close(log2_B[row], log2_1[0], **CLOSE)


@all_features
def test_one_soft_token_per_window(backbone: Backbone, features: str) -> None:
    compressor = made(backbone, features=features)
    for ratio in (2, 4, 8):
        for encoded, length in zip(compressor.encode(TEXTS, ratio), LENGTHS, strict=True):
            soft = compressor.soft_tokens(encoded, ratio)
            assert len(soft) == windows(length, ratio)
            assert (soft.tokens, soft.ratio, soft.fingerprint) == (length, ratio, compressor.fingerprint)
            assert soft.embeddings_MD.dtype == torch.float32


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="start"),
        pytest.param({"window_alignment": "end"}, id="end"),
        pytest.param({"pool_end_token": True}, id="end token pooled"),
        pytest.param({"window_alignment": "end", "pool_end_token": True}, id="end, end token pooled"),
        pytest.param({"ratio_set": (2, 6, 8), "window": 48}, id="ratios that are no powers of 2"),
        # No room for 1200 tokens: the tiny model's window of 256 decides.
        pytest.param({"ratio_set": (2, 6, 8), "window": 1200}, id="the base's window"),
    ],
)
def test_one_encoding_serves_all_ratios(backbone: Backbone, settings: dict[str, Any]) -> None:
    compressor = made(backbone, **settings)
    texts = [*TEXTS, text_of(300)]
    fine = compressor.encode(texts)
    for ratio in compressor.config.ratio_set:
        for at_once, encoded in zip(compressor.encode(texts, ratio), fine, strict=True):
            straight, pooled_again = (compressor.soft_tokens(one, ratio) for one in (at_once, encoded))
            torch.testing.assert_close(straight.embeddings_MD, pooled_again.embeddings_MD, **CLOSE)
            assert at_once.log2_ratio == pytest.approx(encoded.log2_ratio, abs=1e-4)


@pytest.mark.parametrize("alignment", ["start", "end"])
def test_every_token_is_behind_one_window(backbone: Backbone, alignment: str) -> None:
    compressor = made(backbone, window_alignment=alignment)
    for encoded, length in zip(compressor.encode(TEXTS, 8), LENGTHS, strict=True):
        counts = encoded.features.counts_BM.tolist()
        assert sum(counts) == length
        # Whole windows but for one: the last, or aligned to the end the first.
        whole = counts[:-1] if alignment == "start" else counts[1:]
        assert whole == [8.0] * len(whole)


def test_a_text_beyond_the_window_is_encoded_in_pieces(backbone: Backbone) -> None:
    # 70 tokens in a window of 32: 32 + 32 + 6, each blind to the others.
    compressor = made(backbone)
    ids = text_of(70)
    whole = compressor.encode([ids])[0]
    pieces = compressor.encode([ids[:32], ids[32:64], ids[64:]])
    joined = torch.cat([piece.features.states_BMD for piece in pieces])
    torch.testing.assert_close(whole.features.states_BMD, joined, **CLOSE)
    assert whole.log2_ratio == pytest.approx(sum(piece.log2_ratio for piece in pieces) / 3, abs=1e-4)


def test_the_bases_window_limits_a_piece(tiny_model: Path) -> None:
    # 50 tokens in all leave 49 beside the end token; 48 is the largest multiple of 8.
    narrow = Backbone.from_pretrained(tiny_model, dtype=torch.float32, device="cpu", window=50)
    compressor = made(narrow, window=64)
    longest = 0

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal longest
        longest = max(longest, kwargs["inputs_embeds"].shape[1])

    compressor.encoder.register_forward_pre_hook(note, with_kwargs=True)
    encoded = compressor.encode([text_of(100)])[0]
    assert longest == 49
    assert encoded.features.counts_BM.tolist() == [2.0] * 50
    assert compressor.decoder.window == narrow.window


@all_features
def test_an_empty_text_and_no_text(backbone: Backbone, features: str) -> None:
    compressor = made(backbone, features=features)
    assert compressor.encode([], 4) == []
    (encoded,) = compressor.encode([[]], 4)
    assert encoded.tokens == 0
    assert torch.isfinite(torch.tensor(encoded.log2_ratio))
    assert compressor.soft_tokens(encoded, 4).embeddings_MD.shape == (0, 32)


def test_the_end_token_may_join_the_last_window(backbone: Backbone) -> None:
    # 7 tokens and the end token fill a window of 8; 8 tokens need one more.
    compressor = made(backbone, pool_end_token=True)
    counts = [
        encoded.features.counts_BM.tolist() for encoded in compressor.encode([text_of(7), text_of(8)], 8)
    ]
    assert counts == [[8.0], [8.0, 1.0]]
    without = made(backbone).encode([text_of(7)], 8)[0].features.states_BMD
    assert not torch.allclose(compressor.encode([text_of(7)], 8)[0].features.states_BMD, without)


def test_last_tokens_are_the_last_states(backbone: Backbone) -> None:
    # Nine tokens at ratio 4: three states, those of tokens 6, 7 and 8.
    fine = made(backbone, features="mean_pool", ratio_set=(2, 4, 8), pool_end_token=False)
    last = made(backbone, features="last_tokens")
    ids = text_of(9)
    seen = torch.ones(1, 1, 10, 10, dtype=torch.bool)
    with torch.no_grad():
        states = fine.encoder(
            torch.tensor([[*ids, backbone.tokenizer.eos_token_id]]), attention_mask=seen
        ).last_hidden_state[0]
    torch.testing.assert_close(last.encode([ids], 4)[0].features.states_BMD, states[6:9], **CLOSE)


def test_features_for_one_ratio_only(backbone: Backbone) -> None:
    compressor = made(backbone, features="compression_tokens")
    with pytest.raises(InputError, match="got None"):
        compressor.encode([text_of(9)])
    with pytest.raises(InputError, match="encode the text again"):
        compressor.soft_tokens(compressor.encode([text_of(9)], 2)[0], 4)


# ------------------------------------------------------------------------------------- what is seen


def test_a_bidirectional_first_state_moves_with_the_last_token(backbone: Backbone) -> None:
    ids = text_of(20)
    for bidirectional in (True, False):
        compressor = made(backbone, bidirectional=bidirectional)
        before, after = (first_state(compressor, text) for text in (ids, [*ids[:-1], 5]))
        assert torch.allclose(before, after, atol=1e-6) != bidirectional


def test_the_encoder_has_the_layers_asked_for(backbone: Backbone) -> None:
    assert len(made(backbone, encoder_layers=1).encoder.layers) == 1
    assert len(made(backbone).encoder.layers) == 3
    with pytest.raises(CheckpointError, match=r"needs 4 layers, .* has 3; choose"):
        SoftCompressor(backbone, SoftConfig(**SMALL, encoder_layers=4))


class Causal(SoftCompressor):
    def _mask(self, places_T: Tensor, ends_B: Tensor) -> Tensor:
        return super()._mask(places_T, ends_B) & (places_T <= places_T[:, None])


class SeesPadding(SoftCompressor):
    def _mask(self, places_T: Tensor, ends_B: Tensor) -> Tensor:
        return torch.ones_like(super()._mask(places_T, ends_B))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Causal, {}, "must be bidirectional"),
        (SeesPadding, {}, "padding changed"),
        (SeesPadding, {"bidirectional": False}, "must be causal"),
        (SeesPadding, {"features": "last_tokens"}, "padding changed"),
    ],
)
def test_the_self_test_notices_a_mask_that_is_ignored(
    backbone: Backbone, kind: type[SoftCompressor], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        unfinished(backbone, kind, **settings).finish()


def test_the_self_test_notices_nan(backbone: Backbone) -> None:
    compressor = unfinished(backbone)
    with torch.no_grad():
        compressor.encoder.layers[0].mlp.up_proj.lora_B["encoder"].weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError):
        compressor.finish()


# ------------------------------------------------------------------------------------- one base


def test_weights_are_shared_and_the_base_answers_as_before(tiny_model: Path) -> None:
    base = Backbone.from_pretrained(tiny_model, dtype=torch.float32, device="cpu")
    ids_1T = torch.tensor([text_of(30)])
    names = [name for name, _ in base.model.named_parameters()]
    with torch.no_grad():
        before = base.model(ids_1T).logits
    fingerprint = base.fingerprint
    compressor = made(base)
    compressor.encode(TEXTS)
    with torch.no_grad():
        assert torch.equal(base.model(ids_1T).logits, before)
        assert not torch.equal(compressor.decoder.model(ids_1T).logits, before)
    assert [name for name, _ in base.model.named_parameters()] == names
    del base.__dict__["fingerprint"]
    assert base.fingerprint == fingerprint == compressor.base_fingerprint

    own = {id(parameter) for _, parameter in compressor.trained()}
    theirs = {parameter.data_ptr() for parameter in base.model.parameters()}
    shared = [parameter for parameter in compressor.parameters() if id(parameter) not in own]
    assert {parameter.data_ptr() for parameter in shared} == theirs


def test_two_compressors_on_one_base_do_not_mix(backbone: Backbone) -> None:
    one = made(backbone)
    before = one.encode(TEXTS)
    other = unfinished(backbone, encoder_layers=2)
    with torch.no_grad():
        for _, parameter in other.trained():
            parameter.mul_(3)
    other.finish()
    for first, second in zip(before, one.encode(TEXTS), strict=True):
        assert torch.equal(first.features.states_BMD, second.features.states_BMD)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_decoder_wears_its_adapter(backbone: Backbone, rank: int) -> None:
    compressor = made(backbone, decoder_rank=rank)
    ids_1T = torch.tensor([text_of(12)])
    with torch.no_grad():
        plain, ours = (model(ids_1T).logits for model in (backbone.model, compressor.decoder.model))
    assert torch.equal(plain, ours) == (rank == 0)


@pytest.mark.parametrize(("rank", "scale"), [(4, 2.0), (4, 0.3), (2, 0.1)])
def test_the_lora_scale_is_the_one_asked_for(backbone: Backbone, rank: int, scale: float) -> None:
    compressor = made(backbone, encoder_rank=rank, lora_scale=scale)
    scaling = compressor.encoder.layers[0].self_attn.q_proj.scaling["encoder"]
    assert scaling == pytest.approx(scale)


# ------------------------------------------------------------------------------------- training


@all_features
@pytest.mark.parametrize("bidirectional", [True, False])
def test_gradients_reach_everything_that_is_trained(
    backbone: Backbone, features: str, bidirectional: bool
) -> None:
    compressor = made(backbone, trainable=True, features=features, bidirectional=bidirectional)
    found, log2_B = compressor.read([text_of(20), text_of(9)], [4, 4])
    soft_BMD = compressor.converter(found)
    loss = compressor.decoder_model(inputs_embeds=soft_BMD).logits.pow(2).mean() + log2_B.pow(2).mean()
    loss.backward()
    trained = dict(compressor.trained())
    assert {name.split(".")[0] for name in trained} >= {"encoder", "decoder_model", "converter", "ratio_head"}
    assert ("memory_MD" in trained) == (features == "compression_tokens")
    for name, parameter in compressor.named_parameters():
        if name in trained:
            assert parameter.dtype == torch.float32, name
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_finished_for_use_nothing_takes_gradients(backbone: Backbone) -> None:
    assert not any(parameter.requires_grad for _, parameter in made(backbone).trained())


def test_adapters_take_the_dtype_of_a_bfloat16_base(tiny_model: Path) -> None:
    base = Backbone.from_pretrained(tiny_model, dtype=torch.bfloat16, device="cpu")
    for trainable in (False, True):
        compressor = made(base, trainable=trainable)
        kinds = {("lora_" in name, parameter.dtype) for name, parameter in compressor.trained()}
        lora = torch.float32 if trainable else torch.bfloat16
        assert kinds == {(True, lora), (False, torch.float32)}
        soft = compressor.soft_tokens(compressor.encode([text_of(9)])[0], 4)
        assert soft.embeddings_MD.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------- soft tokens


@pytest.mark.parametrize("ratio", [1, 3, 16, 0, -2, float("nan")])
def test_a_ratio_outside_the_set_is_refused(backbone: Backbone, ratio: Any) -> None:
    compressor = made(backbone)
    encoded = compressor.encode([text_of(9)])[0]
    with pytest.raises(InputError, match=r"must be one of \[2, 4, 8\], got .*; choose"):
        compressor.soft_tokens(encoded, ratio)
    with pytest.raises(InputError, match="must be one of"):
        compressor.encode([text_of(9)], ratio)


def test_a_coarser_text_cannot_become_finer(backbone: Backbone) -> None:
    compressor = made(backbone)
    with pytest.raises(InputError, match="ratio 8 cannot become ratio 4"):
        compressor.soft_tokens(compressor.encode([text_of(9)], 8)[0], 4)


def test_soft_tokens_that_are_not_finite_are_refused(backbone: Backbone) -> None:
    compressor = made(backbone)
    encoded = compressor.encode([text_of(9)])[0]
    broken = dataclasses.replace(encoded.features, states_BMD=encoded.features.states_BMD * torch.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        compressor.soft_tokens(dataclasses.replace(encoded, features=broken), 4)


def test_the_fingerprint_follows_weights_and_settings(backbone: Backbone) -> None:
    compressor = unfinished(backbone)
    compressor.finish()
    prints = [compressor.fingerprint]
    compressor.finish()
    assert compressor.fingerprint == prints[0]
    for name, parameter in compressor.trained():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
        compressor.finish()
        assert compressor.fingerprint not in prints, name
        prints.append(compressor.fingerprint)
    assert made(backbone, residual=False).fingerprint not in prints
    assert made(backbone).fingerprint == prints[0]


def test_the_dial_moves_the_chosen_ratio(backbone: Backbone) -> None:
    compressor = SoftCompressor(backbone, SoftConfig(encoder_layers=1, converter_size=8, encoder_rank=2))
    compressor.finish()
    with torch.no_grad():
        compressor.ratio_head.weight.zero_()
        compressor.ratio_head.bias.fill_(2.9)  # 2^2.9 = 7.5: nearest of 2, 4, 8, 16, 32 is 8
    (encoded,) = compressor.encode([range(20, 40)])
    assert compressor.select(encoded) == Selection(8, saturated=False)
    assert compressor.select(encoded, ratio_scale=-1) == Selection(4, saturated=False)
    assert compressor.select(encoded, ratio_scale=3) == Selection(32, saturated=True)
