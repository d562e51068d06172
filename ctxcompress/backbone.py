"""The only door to transformers: one causal language model and the forward passes all else comes from.

- `encode`: text -> token ids with the character span of each.
- `token_signals`: NLL and accumulated attention of every token [DAC], for many texts at once.
- `token_nll`: how badly every token of a text was predicted, without the attention.
- `read_queries`: the attention that questions pay to documents, raw or soft, and the documents' NLL [DAST].
- `prefix_cache`: keys and values of a pass whose first tokens were read before.
- `splice`: token ids and soft tokens -> input embeddings.

No pass ever holds tokens x tokens attention or tokens x vocabulary logits of a whole text.

Shapes: T tokens, D hidden, B rows of a batch, L layers, H heads, Q questions, N documents.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ctxcompress.attention import ATTENTION, ColumnSums, SegmentMass
from ctxcompress.embedded import resolve_model
from ctxcompress.errors import InputError, ModelError
from ctxcompress.types import Span
from ctxcompress.words import readable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Ids = tuple[int, ...]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
BATCH_TOKENS = 4096  # padded tokens of one forward pass over several texts
KEPT_PREFIXES = 4  # prefixes of prompts whose keys and values are kept
VOCABULARY_BLOCK = 32  # tokens whose logits exist at the same time: 32 x 49,152 x (2 + 4) bytes = 9.4 MB
# While transformers loads a model it sets torch's default dtype for all threads.
_LOADING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Encoding:
    """Token ids of a text and the half-open character range of each; the ranges cover the text without gaps.

    Tokens that hold parts of the same character (bytes of an emoji) share that character's range.
    """

    ids: tuple[int, ...]
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class TokenSignals:
    """What one forward pass says about every token of a text.

    Attributes:
        nll_T: (T,) float32 nats; -ln p(token | prefix); 0 at position 0, which nothing predicts.
        attention_T: (T,) float32; sum over queries of the attention received, mean over layers and heads.
    """

    nll_T: Tensor
    attention_T: Tensor


@dataclass(frozen=True, slots=True)
class QueryReading:
    """What questions look at after reading all documents.

    Attributes:
        mass_QLHN: (questions, layers, heads, documents) float32 attention mass.
        nll_N: (documents,) float32; mean NLL of each document's tokens given what precedes them, or None if
            not asked.
    """

    mass_QLHN: Tensor
    nll_N: Tensor | None


class Backbone:
    """A causal language model of the Llama, Mistral, Qwen2 or Qwen3 family with its tokenizer.

    Args:
        model: in evaluation mode; its attention implementation is set to ours, which is SDPA unless a pass
            records.
        tokenizer: a fast one, for character offsets.
        name: what error messages and results call it.
        window: most tokens of one forward pass; None takes the model's own limit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "model",
        window: int | None = None,
    ) -> None:
        if model.config.model_type not in FAMILIES:
            raise ModelError(
                f"{name} must be a causal language model of one of the families {', '.join(FAMILIES)}, got "
                f"{model.config.model_type!r}; choose another model"
            )
        if not tokenizer.is_fast:
            raise ModelError(
                f"{name} must have a fast tokenizer (tokenizer.json), got a slow one; convert it first"
            )
        model.eval()
        model.set_attn_implementation(ATTENTION)
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        # How special tokens are split is state of a tokenizer, not of a call: with one for documents and one
        # for templates, threads cannot turn each other's text into control tokens.
        self._plain: Any = _plain_copy(tokenizer)
        self.name = name
        self._prefixes: dict[Ids, list[tuple[Tensor, Tensor]]] = {}
        # Beyond a sliding window the model itself forgets keys, so a pass never reaches beyond it.
        limits = (model.config.max_position_embeddings, getattr(model.config, "sliding_window", None), window)
        self.window = min(limit for limit in limits if limit)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = "embedded",
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        window: int | None = None,
    ) -> Backbone:
        """Load a model by name: "embedded", a local folder, or a Hugging Face hub id.

        Args:
            name: the model; remote code is never run.
            device: None takes CUDA if there is one, else the CPU.
            dtype: None takes bfloat16 where the processor computes in it, else float32.
            window: most tokens of one forward pass; None takes the model's own limit.

        Raises:
            ModelError: no such model, an unreadable one, or one of another family.
        """
        name = str(name)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        with _LOADING:
            model, tokenizer = _loaded(name, resolve_model(name), dtype or native_dtype(place))
        return cls(model.to(place), tokenizer, name=name, window=window)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def layers_heads(self) -> tuple[int, int]:
        """Number of layers, and of query heads in each."""
        config = self.model.config
        return config.num_hidden_layers, config.num_attention_heads

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the weights (the first values of every tensor, as bfloat16) and of the vocabulary."""
        digest = hashlib.sha256(f"{self.model.config.model_type} {len(self.tokenizer)}".encode())
        for name, tensor in self.model.named_parameters():
            values = tensor.detach().flatten()[:64].to("cpu", torch.bfloat16)
            digest.update(
                f"{name} {tuple(tensor.shape)}".encode() + values.view(torch.int16).numpy().tobytes()
            )
        return digest.hexdigest()[:16]

    def encode(self, text: str) -> Encoding:
        """Tokens of `text` without added special tokens; control strings inside the text are plain text."""
        encoded = self._plain(
            readable(text),
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        return Encoding(tuple(encoded["input_ids"]), _without_gaps(encoded["offset_mapping"], len(text)))

    def count(self, text: str) -> int:
        """Number of tokens of `text`."""
        return len(self.encode(text).ids)

    @torch.inference_mode()
    def token_signals(self, texts: Sequence[Sequence[int]]) -> list[TokenSignals]:
        """NLL and accumulated attention of every token of every text; a batch equals its texts one by one.

        A text longer than the window is read in windows that overlap by half: every token is predicted, and
        attends, exactly once, with between half a window and a whole one of context. The first key of a later
        window stands for everything before it and collects attention for that, so what it receives there is
        not counted.
        """
        nll = [torch.zeros(len(ids), dtype=torch.float32) for ids in texts]
        attention = [torch.zeros(len(ids), dtype=torch.float32) for ids in texts]
        pieces = [piece for text, ids in enumerate(texts) for piece in _windows(text, len(ids), self.window)]
        for places in batches([piece.stop - piece.start for piece in pieces]):
            batch = [pieces[place] for place in places]
            rows = [list(texts[piece.text][piece.start : piece.stop]) for piece in batch]
            nll_BT, attention_BT = self._forward_signals(rows, [piece.fresh - piece.start for piece in batch])
            for row, piece in enumerate(batch):
                fresh, length = piece.fresh - piece.start, piece.stop - piece.start
                nll[piece.text][piece.fresh : piece.stop] = nll_BT[row, fresh:length]
                first_key = 1 if piece.start else 0
                attention[piece.text][piece.start + first_key : piece.stop] += attention_BT[
                    row, first_key:length
                ]
        return [TokenSignals(*signals) for signals in zip(nll, attention, strict=True)]

    @torch.inference_mode()
    def token_nll(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """`token_signals(texts)[i].nll_T` of each text, for the price of a plain forward pass."""
        nll = [torch.zeros(len(ids), dtype=torch.float32) for ids in texts]
        pieces = [piece for text, ids in enumerate(texts) for piece in _windows(text, len(ids), self.window)]
        for places in batches([piece.stop - piece.start for piece in pieces]):
            batch = [pieces[place] for place in places]
            ids_BT = self._padded([texts[piece.text][piece.start : piece.stop] for piece in batch])
            hidden_BTD = self.model.model(ids_BT, use_cache=False).last_hidden_state
            nll_BT = self._row_nll(hidden_BTD, ids_BT, [piece.stop - piece.start for piece in batch])
            for row, piece in enumerate(batch):
                fresh, length = piece.fresh - piece.start, piece.stop - piece.start
                nll[piece.text][piece.fresh : piece.stop] = nll_BT[row, fresh:length]
        return nll

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """(B, T) token ids; padding on the right, which causal attention never sees."""
        tensors = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(self.device)

    def _forward_signals(self, rows: list[list[int]], fresh: list[int]) -> tuple[Tensor, Tensor]:
        ids_BT = self._padded(rows)
        recorder = ColumnSums([(start, len(row)) for start, row in zip(fresh, rows, strict=True)])
        hidden_BTD = self.model.model(ids_BT, use_cache=False, recorder=recorder).last_hidden_state
        return self._row_nll(hidden_BTD, ids_BT, [len(row) for row in rows]), recorder.mean_BT.cpu()

    def _row_nll(self, hidden_BTD: Tensor, ids_BT: Tensor, lengths: Sequence[int]) -> Tensor:
        nll_BT = torch.zeros(ids_BT.shape, dtype=torch.float32)
        for row, length in enumerate(lengths):
            nll_BT[row, 1:length] = self._nll(hidden_BTD[row, : length - 1], ids_BT[row, 1:length])
        return nll_BT

    def _nll(self, hidden_TD: Tensor, next_ids_T: Tensor) -> Tensor:
        """-ln p(next token) for every hidden state, (T,) float32 on the CPU."""
        weight_VD = self.model.get_output_embeddings().weight
        rows, vocabulary = min(VOCABULARY_BLOCK, len(hidden_TD)), len(weight_VD)
        # All blocks share two buffers: fresh ones of this size would leave the C heap full of holes, hundreds
        # of MB.
        raw_TV = weight_VD.new_empty(rows, vocabulary)
        logits_TV = weight_VD.new_empty(rows, vocabulary, dtype=torch.float32)
        nll_T = torch.empty(len(hidden_TD), dtype=torch.float32, device=weight_VD.device)
        for start in range(0, len(hidden_TD), VOCABULARY_BLOCK):
            block = slice(start, start + VOCABULARY_BLOCK)
            count = len(hidden_TD[block])
            logits = logits_TV[:count].copy_(torch.mm(hidden_TD[block], weight_VD.T, out=raw_TV[:count]))
            target_T = logits.gather(1, next_ids_T[block, None]).squeeze(1)
            largest_T1 = logits.amax(dim=1, keepdim=True)
            log_total_T = logits.sub_(largest_T1).exp_().sum(dim=1).log_() + largest_T1.squeeze(1)
            nll_T[block] = log_total_T - target_T
        return nll_T.cpu()

    @torch.inference_mode()
    def read_queries(
        self,
        documents: Sequence[Ids | Tensor],
        questions: Sequence[Sequence[int]],
        *,
        prefix: Ids,
        last_token: bool = False,
        layers: int | None = None,
        with_nll: bool = False,
    ) -> QueryReading:
        """Read all documents and, after them, each question apart, in one pass; see where its tokens look.

        Documents that do not fit the window together are read in as few windows as their order allows, a
        longer one in pieces; a window's mass counts by its share of all tokens.

        Args:
            documents: of each the token ids or (M, D) embeddings, with its separator, which belongs to the
                document it follows.
            questions: token ids of each question, tried independently after the same documents.
            prefix: token ids before the first document; they take the attention that any first token draws.
            last_token: mass of the last question token instead of the mean over all.
            layers: read only this many layers, which costs only these; None reads all.
            with_nll: also compute the documents' NLL; needs all layers, and token ids.

        Raises:
            InputError: a question leaves no room for documents.
        """
        room = self.window - len(prefix) - max(map(len, questions))
        if room < 1:
            raise InputError(
                f"the question must leave room for documents in a window of {self.window} tokens, got "
                f"{max(map(len, questions))} tokens; shorten it, or load the model with a larger window"
            )
        depth, heads = self.layers_heads
        depth = depth if layers is None or with_nll else layers
        total = sum(map(len, documents))
        mass_QLHN = torch.zeros(len(questions), depth, heads, len(documents), dtype=torch.float32)
        nll_N = torch.zeros(len(documents), dtype=torch.float32)
        for pieces in _packed(documents, room):
            reading = self._read_window(documents, pieces, questions, prefix, last_token, depth, with_nll)
            weight = sum(piece.stop - piece.start for piece in pieces) / total
            places = torch.tensor([piece.text for piece in pieces])
            mass_QLHN.index_add_(-1, places, reading.mass_QLHN * weight)
            if reading.nll_N is not None:
                nll_N.index_add_(0, places, reading.nll_N)
        lengths_N = torch.tensor([max(len(ids), 1) for ids in documents])
        return QueryReading(mass_QLHN, nll_N / lengths_N if with_nll else None)

    def _read_window(
        self,
        documents: Sequence[Ids | Tensor],
        pieces: Sequence[_Piece],
        questions: Sequence[Sequence[int]],
        prefix: Ids,
        last_token: bool,
        depth: int,
        with_nll: bool,
    ) -> QueryReading:
        """One window's mass per piece, and the *sum* of each piece's NLL."""
        cache, known = self.prefix_cache(prefix)
        parts: list[Ids | Tensor] = [prefix[known:]]
        segments: list[Span] = []
        end = len(prefix)
        for piece in pieces:
            parts.append(documents[piece.text][piece.start : piece.stop])
            segments.append((end, end + len(parts[-1])))
            end = segments[-1][1]
        recorder = SegmentMass(segments, list(map(len, questions)))
        positions = [
            *range(known, end),
            *(end + place for question in questions for place in range(len(question))),
        ]
        rows_TD = splice([*parts, *map(tuple, questions)], self.model.get_input_embeddings())
        hidden_TD = self._trunk(depth)(
            inputs_embeds=rows_TD[None],
            position_ids=torch.tensor([positions], device=self.device),
            # The recorder knows who sees whom; without a mask transformers would build one of T x T.
            attention_mask=rows_TD.new_zeros(1, 1, 1, 1),
            past_key_values=cache,
            recorder=recorder,
        ).last_hidden_state[0, : end - known]
        nll_N = None
        if with_nll:
            ids_T = torch.tensor([token for part in parts for token in part], device=self.device)
            nll_T = torch.cat([torch.zeros(1, dtype=torch.float32), self._nll(hidden_TD[:-1], ids_T[1:])])
            nll_N = torch.stack([nll_T[start - known : stop - known].sum() for start, stop in segments])
        masses = [
            mass_LHQN[:, :, -1] if last_token else mass_LHQN.mean(dim=2) for mass_LHQN in recorder.masses
        ]
        return QueryReading(torch.stack(masses).cpu(), nll_N)

    @torch.inference_mode()
    def prefix_cache(self, ids: Sequence[int], rows: int = 1) -> tuple[DynamicCache, int]:
        """A cache for a pass that begins with `ids`: keys and values of all of them but the last.

        Prompts of one chat template begin alike, and what is kept of that costs its pass only once. The last
        token is left to the new pass, whose first state then predicts what follows the prefix.

        Args:
            ids: first tokens of every row.
            rows: of the pass.

        Returns:
            The cache, and how many tokens are in it.
        """
        known = tuple(ids[:-1])
        cache = DynamicCache()
        if known:
            for layer, states in enumerate(self._kept(known)):
                cache.update(*(each.expand(rows, -1, -1, -1) for each in states), layer)
        return cache, len(known)

    def _kept(self, ids: Ids) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (1, H, T, D) of every layer."""
        kept = self._prefixes.get(ids)
        if kept is None:
            cache = DynamicCache()
            self.model.model(torch.tensor([ids], device=self.device), past_key_values=cache, use_cache=True)
            kept = [(layer.keys, layer.values) for layer in cache.layers]
            # Another thread may have done the same meanwhile: either result will do.
            self._prefixes = dict([*self._prefixes.items(), (ids, kept)][-KEPT_PREFIXES:])
        return kept

    def sharing(self, depth: int | None = None) -> Any:
        """The model with modules of its own around the same weights, so that adapters can be added to it.

        Args:
            depth: the first layers only, without the head; None keeps everything.
        """
        weights = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        return copy.deepcopy(self.model if depth is None else self._trunk(depth), weights)

    def _trunk(self, depth: int) -> Any:
        """The model without its head and without the layers after `depth`; shares all weights."""
        trunk = copy.copy(self.model.model)
        trunk._modules = dict(trunk._modules)
        trunk.layers = trunk.layers[:depth]
        return trunk


def splice(segments: Sequence[Ids | Tensor], embed: torch.nn.Embedding) -> Tensor:
    """(T, D) input embeddings of a prompt: looked up for token ids, taken as they are for soft tokens.

    Args:
        segments: token ids, or (M, D) embeddings.
        embed: the decoder's input embedding.
    """
    table = embed.weight
    return torch.cat(
        [
            segment.to(table)
            if isinstance(segment, Tensor)
            else embed(torch.tensor(segment, device=table.device))
            for segment in segments
            if len(segment)
        ]
    )


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of texts of similar length together, so that little of a batch is padding.

    A batch has at most BATCH_TOKENS tokens with its padding, unless one text alone has more.
    """
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[place] * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens `start:stop` of text number `text`; those before `fresh` are only context."""

    text: int
    start: int
    fresh: int
    stop: int


def _loaded(name: str, source: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype), tokenizer
    except (OSError, ValueError) as error:
        kind = "local folder" if Path(source).exists() else "hub id"
        raise ModelError(
            f'the model must be "embedded", a folder with a model, or a hub id within reach, got {name!r} '
            f"({kind}): {str(error).splitlines()[0]}; check the spelling and the folder's config.json"
        ) from error


def _plain_copy(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A copy for documents: all control tokens are special ones in it, which `encode` splits like any text.

    Vocabularies do not mark all of them, for example "<think>". Added tokens that are only words stay tokens.
    """
    plain: Any = copy.deepcopy(tokenizer)
    added = [token.content for token in plain.backend_tokenizer.get_added_tokens_decoder().values()]
    plain.backend_tokenizer.add_special_tokens(
        [text for text in added if not all(letter.isalnum() or letter.isspace() for letter in text)]
    )
    return plain


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies matrices in it, else float32 (float16 on older GPUs)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    capability = torch.backends.cpu.get_cpu_capability()
    has_bf16 = capability.startswith("AVX512") and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return torch.bfloat16 if has_bf16 else torch.float32


def _without_gaps(offsets: Sequence[Span], length: int) -> tuple[Span, ...]:
    """Stretch token spans over the text: characters a tokenizer leaves out join the token after them."""
    spans: list[Span] = []
    end = 0
    for start, stop in offsets:
        spans.append((min(start, end), max(stop, start)))
        end = max(end, stop)
    if spans:
        spans[-1] = (spans[-1][0], length)
    return tuple(spans)


def _windows(text: int, length: int, window: int) -> Iterator[_Piece]:
    """One piece if the text fits, else pieces that begin half a window before their first fresh token."""
    if length:
        yield _Piece(text, 0, 0, min(window, length))
    half = max(window // 2, 1)
    for fresh in range(window, length, half):
        yield _Piece(text, fresh - half, fresh, min(fresh + half, length))


def _packed(documents: Sequence[Ids | Tensor], room: int) -> Iterator[list[_Piece]]:
    """Documents in order into windows of at most `room` tokens; only a document longer than that is cut."""
    window: list[_Piece] = []
    used = 0
    for text, ids in enumerate(documents):
        for start in range(0, len(ids), room):
            piece = _Piece(text, start, start, min(start + room, len(ids)))
            size = piece.stop - piece.start
            if window and used + size > room:
                yield window
                window, used = [], 0
            window.append(piece)
            used += size
    if window:
        yield window
