"""Which compressor a component works with: settings that travel, or a compressor of the caller's own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import Field, field_validator, model_validator
from llama_index.core.schema import BaseComponent

if TYPE_CHECKING:
    from ctxcompress import ContextCompressor
else:
    ContextCompressor = Any  # pydantic wants a class at run time, and the real one would bring torch with it


class CompressorSettings(BaseComponent):
    """Components with equal settings share one compressor, and with it one model and one store.

    Args:
        model: "embedded", a local folder or a hub id; loaded at first use.
        adapter: the model's soft-token adapter, a folder or hub id; "embedded" is the one that ships with the
            embedded model; None is text only.
        device: of the model, such as "cuda:1"; None takes CUDA if there is one.
        store: folder that keeps what was encoded for soft mode; None keeps it in memory.
        compressor: a compressor of your own, used instead of these settings; `model` then takes its model's
            name. Give its adapter and store too if copies made from `to_dict` or a pickle, which load a
            compressor again, shall have them.
    """

    model: str = "embedded"
    adapter: str | None = "embedded"
    device: str | None = None
    store: str | None = None
    compressor: ContextCompressor | None = Field(default=None, exclude=True, repr=False)

    @field_validator("model", "adapter", "store", mode="before")
    @classmethod
    def _as_string(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @model_validator(mode="after")
    def _named(self) -> CompressorSettings:
        if self.compressor is not None:
            self.model = self.compressor.backbone.name
        return self

    def get_compressor(self) -> ContextCompressor:
        """The caller's own compressor, or the one that all components with these settings share.

        Raises:
            ctxcompress.ModelError: the model cannot be loaded.
        """
        if self.compressor is not None:
            return self.compressor
        from ctxcompress import ContextCompressor

        return ContextCompressor.shared(
            self.model, device=self.device, adapter=self.adapter, store=self.store
        )

    def __getstate__(self) -> dict[str, Any]:
        # The base class tries to pickle every attribute, and would only give up after a model's weights.
        fields = {name: getattr(self, name) for name in type(self).model_fields if name != "compressor"}
        state: dict[str, Any] = super(CompressorSettings, type(self)(**fields)).__getstate__()
        return state
