"""Text -> soft tokens: one resident base model that wears two LoRA adapters, an encoder's and a decoder's.

encode (once per text) -> pool (any ratio of the set) -> convert -> soft tokens for the decoder.

The encoder is the first layers of the base, usually bidirectional; the decoder is the whole base. Both share
the base's weights, so a compressor costs its adapters, not a second model.

Shapes: B batch, T tokens, M soft tokens, D hidden.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ctxcompress.backbone import Backbone, batches
from ctxcompress.config import SoftConfig
from ctxcompress.errors import CheckpointError, InputError
from ctxcompress.pooling import pool, windows
from ctxcompress.selector import Selection, select_ratio
from ctxcompress.types import SoftTokens

ENCODER, DECODER = "encoder", "decoder"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SPREAD = 3.0  # what the converter may add at first, in standard deviations of the embedding table


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """What the encoder keeps of texts, ready to be pooled further; padding has count 0.

    Attributes:
        states_BMD: encoder states, means over windows.
        embeddings_BMD: input embeddings, means over the same windows.
        counts_BM: tokens behind each mean.
    """

    states_BMD: Tensor
    embeddings_BMD: Tensor
    counts_BM: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class EncodedText:
    """One text at the finest ratio of the set, independent of any query and budget.

    Attributes:
        features: of one text, without the batch dimension and without padding.
        ratio: the ratio these features were pooled at.
        tokens: of the text.
        log2_ratio: what the ratio head predicts, mean over the text's pieces.
    """

    features: Features
    ratio: int
    tokens: int
    log2_ratio: float


class Converter(nn.Module):
    """Window means -> the decoder's embedding space: RMSNorm, Linear, GELU, Linear, and the residual.

    Args:
        hidden: size of encoder states.
        inner: hidden units.
        embedding: size of the decoder's embeddings.
        scale: factor of the learned part at the start.
        residual: add the window's mean input embedding.
    """

    def __init__(self, hidden: int, inner: int, embedding: int, scale: float, residual: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, embedding, bias=False)
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.residual = residual

    def forward(self, features: Features) -> Tensor:
        """Soft tokens (B, M, D) in float32; those of padding are finite and meaningless."""
        inner_BMD = nn.functional.gelu(self.up(self.norm(features.states_BMD)))
        soft_BMD: Tensor = self.scale * self.down(inner_BMD)
        if self.residual:
            # Means of n independent embeddings shrink with sqrt(n); the decoder expects the size of one.
            soft_BMD = soft_BMD + features.embeddings_BMD * features.counts_BM.sqrt()[..., None]
        return soft_BMD


class SoftCompressor(nn.Module):
    """Encoder, converter, ratio head, and the decoder they were trained for.

    Args:
        base: the resident model; its weights are shared, never changed.
        config: what to build. Weights are fresh; `checkpoint.load` fills in trained ones.
    """

    def __init__(self, base: Backbone, config: SoftConfig) -> None:
        super().__init__()
        self.config = config
        self.base_name = base.name
        depth, _ = base.layers_heads
        layers = config.encoder_layers or depth
        if layers > depth:
            raise CheckpointError(
                f"the encoder needs {layers} layers, {base.name} has {depth}; choose a base with more"
            )
        hidden = base.model.config.hidden_size
        decoder = base.sharing()
        self.encoder = base.sharing(layers)
        _add_lora(self.encoder, ENCODER, config.encoder_rank, config.lora_scale)
        if config.decoder_rank:
            _add_lora(decoder, DECODER, config.decoder_rank, config.lora_scale)
        self.decoder_model = decoder
        table = base.model.get_input_embeddings().weight
        spread = float(table.float().std())
        device = table.device
        with torch.device(device):
            self.converter = Converter(
                hidden,
                config.converter_size,
                hidden,
                SPREAD * spread if config.residual else 1.0,
                config.residual,
            )
            self.ratio_head = nn.Linear(hidden, 1)
            if config.features == "compression_tokens":
                memory = torch.randn(windows(config.window, config.ratio_set[0]), hidden) * spread
                self.memory_MD = nn.Parameter(memory)
        self.tokenizer = base.tokenizer
        self.window = min(config.window, base.window - 1)
        self.base_fingerprint = base.fingerprint
        self.base_window = base.window
        self.fingerprint = ""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.ratio_head.weight.device

    @functools.cached_property
    def decoder(self) -> Backbone:
        """The model that reads the soft tokens: the base under the decoder's adapter."""
        return Backbone(self.decoder_model, self.tokenizer, name=self.base_name, window=self.base_window)

    def finish(self, *, trainable: bool = False) -> None:
        """After weights are in place: dtypes, the self-test, and the fingerprint soft tokens will carry.

        Args:
            trainable: adapters stay float32 and take gradients; otherwise they take the base's dtype, which
                is faster.

        Raises:
            CheckpointError: the encoder does not see what its configuration says, padding changes a text, or
                weights are not finite.
        """
        native = self.encoder.embed_tokens.weight.dtype
        self.requires_grad_(False)
        for name, parameter in self.trained():
            dtype = native if "lora_" in name and not trainable else torch.float32
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(trainable)
        self.fingerprint = self.identity()
        self._test_attention()

    def identity(self) -> str:
        """Hash of the base, the configuration and the adapters' weights as they are now, in bfloat16."""
        digest = hashlib.sha256(f"{self.base_fingerprint} {self.config}".encode())
        for name, parameter in self.trained():
            values = parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16)
            digest.update(name.encode() + values.numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.inference_mode()
    def _test_attention(self) -> None:
        """Changing the last token must move the first state (if bidirectional), and padding must not."""
        ids = [
            token % self.encoder.embed_tokens.num_embeddings
            for token in range(11, 11 + 4 * self.config.ratio_set[0])
        ]
        finest = self.config.ratio_set[0]
        if not torch.isfinite(self.read([ids], [finest])[0].states_BMD).all():
            raise CheckpointError(
                "the encoder's states must be finite, got NaN or infinity: copy the weights again"
            )
        layers = self.encoder.layers
        # All layers get the same mask, and only the first are near enough to the input: rounding grows with
        # depth until it passes for a leak.
        self.encoder.layers = layers[:2]
        try:
            alone, changed = (self.read([text], [finest])[0].states_BMD[0] for text in (ids, [*ids[:-1], 1]))
            beside = self.read([ids, ids * 2], [finest] * 2)[0].states_BMD[0, : len(alone)]
        finally:
            self.encoder.layers = layers
        size = float(alone.abs().max())
        moved, padded = float((alone - changed)[0].abs().max()), float((alone - beside).abs().max())
        if self.config.features == "mean_pool" and (moved > 1e-4 * size) != self.config.bidirectional:
            wanted = "bidirectional" if self.config.bidirectional else "causal"
            raise CheckpointError(
                f"the encoder must be {wanted}, but the last token moved the first state by {moved:.2g} of "
                f"{size:.2g}; this transformers version treats attention masks differently"
            )
        if not padded <= 0.05 * size:
            raise CheckpointError(
                f"padding changed a text's states by {padded:.2g} of {size:.2g}; this transformers version "
                "treats attention masks differently"
            )

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and values of everything that is not the base's."""
        for name, parameter in self.named_parameters():
            if "lora_" in name or name.split(".")[0] in {"converter", "ratio_head", "memory_MD"}:
                yield name, parameter

    @torch.inference_mode()
    def encode(self, texts: Sequence[Sequence[int]], ratio: int | None = None) -> list[EncodedText]:
        """Encode token ids, texts of similar length together.

        Args:
            texts: token ids of each; a text beyond the window is encoded in pieces, all but one a multiple of
                every ratio, so that windows stay whole.
            ratio: pool at this ratio; None takes the finest, from which coarser ones follow exactly. Features
                other than "mean_pool" depend on the ratio and must be told.

        Returns:
            One result per text, in order; an empty text has no windows.
        """
        ratio = self._checked(ratio)
        pieces = [
            (text, start, stop) for text, ids in enumerate(texts) for start, stop in self.pieces(len(ids))
        ]
        done: dict[tuple[int, int, int], tuple[Features, float]] = {}
        for places in batches([stop - start + 1 for _, start, stop in pieces]):
            batch = [pieces[place] for place in places]
            ids = [texts[text][start:stop] for text, start, stop in batch]
            last = [stop == len(texts[text]) for text, _, stop in batch]
            features, log2_B = self.read(ids, [ratio] * len(ids), last)
            for row, piece in enumerate(batch):
                count = int((features.counts_BM[row] > 0).sum())
                parts = (features.states_BMD, features.embeddings_BMD, features.counts_BM)
                # A copy: a view would keep the whole padded batch alive.
                done[piece] = Features(*(part[row, :count].clone() for part in parts)), float(log2_B[row])
        return [self._joined(text, ids, ratio, done) for text, ids in enumerate(texts)]

    def soften(
        self,
        texts: Sequence[Sequence[int]],
        ratios: Sequence[int],
        encoded: Sequence[EncodedText] | None = None,
    ) -> list[SoftTokens]:
        """Soft tokens of each text at its own ratio.

        Args:
            texts: token ids of each.
            ratios: of the set.
            encoded: the texts as `encode` left them; saves encoding them where features allow other ratios.
        """
        if self.config.features == "mean_pool":
            return self.convert(self.encode(texts) if encoded is None else encoded, ratios)
        made: dict[int, SoftTokens] = {}
        for ratio in set(ratios):
            places = [place for place, own in enumerate(ratios) if own == ratio]
            encoded = self.encode([texts[place] for place in places], ratio)
            made |= zip(places, self.convert(encoded, [ratio] * len(places)), strict=True)
        return [made[place] for place in range(len(texts))]

    def size(self, tokens: int, ratio: int) -> int:
        """Soft tokens of a text of `tokens` at `ratio`; at 1, raw text, its tokens."""
        return tokens if ratio == 1 else windows(tokens + self.config.pool_end_token, ratio)

    def select(self, encoded: EncodedText, ratio_scale: float = 0.0) -> Selection:
        """The ratio that the head predicts for a text, quantised to the set; see `selector.select_ratio`."""
        return select_ratio(
            encoded.log2_ratio,
            self.config.ratio_set,
            ratio_scale=ratio_scale,
            space=self.config.ratio_space,
        )

    def soft_tokens(self, encoded: EncodedText, ratio: int) -> SoftTokens:
        """`convert` of one text."""
        return self.convert([encoded], [ratio])[0]

    @torch.inference_mode()
    def convert(self, encoded: Sequence[EncodedText], ratios: Sequence[int]) -> list[SoftTokens]:
        """Pool encoded texts, each to its own ratio, and convert them together for the decoder.

        Raises:
            InputError: a ratio outside the set, or not a multiple of the encoded one.
            CheckpointError: a soft token is NaN or infinite.
        """
        if not encoded:
            return []
        pooled = [self._pooled_to(text, ratio) for text, ratio in zip(encoded, ratios, strict=True)]
        together = Features(
            torch.cat([features.states_BMD for features in pooled]),
            torch.cat([features.embeddings_BMD for features in pooled]),
            torch.cat([features.counts_BM for features in pooled]),
        )
        soft_MD = self.converter(together).to(self.encoder.embed_tokens.weight.dtype)
        if not torch.isfinite(soft_MD).all():
            raise CheckpointError("soft tokens are not finite: the adapter or the text's states hold NaN")
        rows = soft_MD.split([len(features.counts_BM) for features in pooled])
        return [
            SoftTokens(own_MD, text.tokens, ratio, self.fingerprint)
            for own_MD, text, ratio in zip(rows, encoded, ratios, strict=True)
        ]

    def _pooled_to(self, encoded: EncodedText, ratio: int) -> Features:
        self._checked(ratio)
        if ratio % encoded.ratio or (ratio != encoded.ratio and self.config.features != "mean_pool"):
            raise InputError(
                f"features encoded at ratio {encoded.ratio} cannot become ratio {ratio}; encode the text "
                "again"
            )
        return self.pooled(encoded.features, ratio // encoded.ratio)

    @torch.inference_mode()
    def embedded(self, ids: Sequence[int], ratio: int) -> Tensor:
        """(M, D) float32 means of a text's input embeddings of windows of `ratio` tokens, as in `encode`."""
        end = [self.tokenizer.eos_token_id] if self.config.pool_end_token else []
        rows_TD = self.encoder.embed_tokens(torch.tensor([*ids, *end], dtype=torch.long, device=self.device))
        counts_T = torch.ones(len(rows_TD), device=self.device)
        return pool(rows_TD.float(), counts_T, ratio, self.config.window_alignment)[0]

    def pooled(self, features: Features, factor: int) -> Features:
        """Features with `factor` neighbouring windows made one."""
        alignment = self.config.window_alignment
        states_BMD, counts_BM = pool(features.states_BMD, features.counts_BM, factor, alignment)
        embeddings_BMD, _ = pool(features.embeddings_BMD, features.counts_BM, factor, alignment)
        return Features(states_BMD, embeddings_BMD, counts_BM)

    def read(
        self, texts: Sequence[Sequence[int]], ratios: Sequence[int], last: Sequence[bool] | None = None
    ) -> tuple[Features, Tensor]:
        """One differentiable encoder pass: features and the predicted log2 ratio of each text.

        Args:
            texts: token ids of each, at most `window` tokens.
            ratios: of each, of the set.
            last: which are the last pieces of their texts, whose end token may be pooled; None means all.

        Returns:
            Features padded to the most windows, and (B,) float32.
        """
        embed = self.encoder.embed_tokens
        lengths = [len(ids) for ids in texts]
        counts = [windows(length, ratio) for length, ratio in zip(lengths, ratios, strict=True)]
        memories = counts if self.config.features == "compression_tokens" else [0] * len(lengths)
        ids_BT = _padded([torch.tensor([*ids, self.tokenizer.eos_token_id]) for ids in texts]).to(self.device)
        embeddings_BTD = embed(ids_BT)
        if any(memories):
            embeddings_BTD = _padded(
                [
                    torch.cat([row[:n], self.memory_MD[:m].to(row.dtype), row[n : n + 1]])
                    for row, n, m in zip(embeddings_BTD, lengths, memories, strict=True)
                ]
            )
        ends_B = torch.tensor(lengths, device=self.device) + torch.tensor(memories, device=self.device)
        places_T = torch.arange(embeddings_BTD.shape[1], device=self.device)
        hidden_BTD = self.encoder(
            inputs_embeds=embeddings_BTD,
            attention_mask=self._mask(places_T, ends_B),
            use_cache=False,
        ).last_hidden_state.float()
        rows_B = torch.arange(len(texts), device=self.device)
        log2_B = (
            self.ratio_head(hidden_BTD[rows_B, ends_B].to(self.ratio_head.weight.dtype)).squeeze(-1).float()
        )
        return self._features(
            hidden_BTD, embeddings_BTD.float(), places_T, ends_B, ratios, counts, last
        ), log2_B

    def _features(
        self,
        hidden_BTD: Tensor,
        embeddings_BTD: Tensor,
        places_T: Tensor,
        ends_B: Tensor,
        ratios: Sequence[int],
        counts: Sequence[int],
        last_piece: Sequence[bool] | None,
    ) -> Features:
        if self.config.features == "mean_pool":
            closed_B = torch.tensor(last_piece or [True] * len(ratios), device=self.device)
            stops_B = ends_B + (closed_B & self.config.pool_end_token)
            counts_BT = (places_T < stops_B[:, None]).float()
            if self.config.window_alignment == "start":
                return self._each_pooled(Features(hidden_BTD, embeddings_BTD, counts_BT), ratios)
            # Windows that end with the text know no padding, so each text is pooled alone.
            rows = [
                self.pooled(
                    Features(hidden_BTD[row, :stop], embeddings_BTD[row, :stop], counts_BT[row, :stop]), ratio
                )
                for row, (stop, ratio) in enumerate(zip(stops_B.tolist(), ratios, strict=True))
            ]
            return Features(
                _padded([row.states_BMD for row in rows]),
                _padded([row.embeddings_BMD for row in rows]),
                _padded([row.counts_BM for row in rows]),
            )
        # The last M states: of the text, or of the learned tokens that stand between text and end token.
        ends = ends_B.tolist()

        def last(states_BTD: Tensor) -> Tensor:
            return _padded([row[end - m : end] for row, end, m in zip(states_BTD, ends, counts, strict=True)])

        return Features(
            last(hidden_BTD),
            last(embeddings_BTD),
            _padded([torch.ones(m, device=self.device) for m in counts]),
        )

    def _each_pooled(self, features: Features, ratios: Sequence[int]) -> Features:
        """Token features with every row pooled to its own ratio, padded to the most windows."""
        finest = self.config.ratio_set[0]
        features = self.pooled(features, finest)
        kinds = sorted(set(ratios))
        if kinds == [finest]:
            return features
        places = [[row for row, own in enumerate(ratios) if own == ratio] for ratio in kinds]
        order_B = torch.tensor([row for rows in places for row in rows], device=self.device)
        parts = []
        for ratio, rows_B in zip(kinds, order_B.split(list(map(len, places))), strict=True):
            own = (features.states_BMD, features.embeddings_BMD, features.counts_BM)
            parts.append(self.pooled(Features(*(part[rows_B] for part in own)), ratio // finest))
        width = max(part.counts_BM.shape[1] for part in parts)
        back_B = order_B.argsort()

        def joined(rows: Sequence[Tensor]) -> Tensor:
            # Part by part, not row by row: a GPU waits for every operation that is asked for.
            sides = [(0, 0) * (part.dim() - 2) + (0, width - part.shape[1]) for part in rows]
            return torch.cat([nn.functional.pad(*each) for each in zip(rows, sides, strict=True)])[back_B]

        return Features(
            joined([part.states_BMD for part in parts]),
            joined([part.embeddings_BMD for part in parts]),
            joined([part.counts_BM for part in parts]),
        )

    def _mask(self, places_T: Tensor, ends_B: Tensor) -> Tensor:
        """(B, 1, T, T) bool, True where a query may look; explicit, since some kernels ignore flags."""
        seen_BT = places_T <= ends_B[:, None]
        mask_B1TT = seen_BT[:, None, None, :].expand(-1, 1, len(places_T), -1)
        return mask_B1TT if self.config.bidirectional else mask_B1TT & (places_T <= places_T[:, None])

    def _checked(self, ratio: int | None) -> int:
        if ratio is None and self.config.features == "mean_pool":
            return self.config.ratio_set[0]
        if ratio not in self.config.ratio_set:
            raise InputError(
                f"the ratio must be one of {list(self.config.ratio_set)}, got {ratio}; choose one of these, "
                "or train an adapter with it"
            )
        return ratio

    def pieces(self, tokens: int) -> list[tuple[int, int]]:
        """Token ranges encoded together; all but one a multiple of every ratio, so windows stay whole."""
        size = self.window - self.window % math.lcm(*self.config.ratio_set) or self.window
        short = (tokens + self.config.pool_end_token) % size if self.config.window_alignment == "end" else 0
        return list(pairwise([0, *range(short or size, tokens, size), tokens]))

    def _joined(
        self,
        text: int,
        ids: Sequence[int],
        ratio: int,
        done: dict[tuple[int, int, int], tuple[Features, float]],
    ) -> EncodedText:
        pieces = [done[text, start, stop] for start, stop in self.pieces(len(ids))]
        features = Features(
            torch.cat([piece.states_BMD for piece, _ in pieces]),
            torch.cat([piece.embeddings_BMD for piece, _ in pieces]),
            torch.cat([piece.counts_BM for piece, _ in pieces]),
        )
        return EncodedText(features, ratio, len(ids), sum(log2 for _, log2 in pieces) / len(pieces))


def _add_lora(model: nn.Module, name: str, rank: int, scale: float) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    alpha: Any = scale * rank  # PEFT says int, but only divides it by the rank
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(LORA_TARGETS), use_rslora=False)
    inject_adapter_in_model(config, model, adapter_name=name)


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
