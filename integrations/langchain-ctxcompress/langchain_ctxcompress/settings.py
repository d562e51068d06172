"""Which model, adapter and store: the settings that nodes and the chat model have in common."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, model_validator

from ctxcompress import ConfigError

if TYPE_CHECKING:
    from ctxcompress import ContextCompressor
else:
    ContextCompressor = Any  # pydantic wants a class at run time, and the real one would bring torch with it


def _plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


Name = Annotated[str, BeforeValidator(_plain)]
"""A name or a path; kept as a string, which serialises."""


class ModelSettings(BaseModel):
    """A model with its adapter and store, loaded at first use, once per process for equal settings."""

    model: Name = Field(default="embedded", frozen=True, validation_alias=AliasChoices("model", "model_name"))
    device: str | None = Field(default=None, frozen=True)
    adapter: Name | None = Field(default="embedded", frozen=True)
    store: Name | None = Field(default=None, frozen=True)
    compressor: ContextCompressor | None = Field(default=None, exclude=True, frozen=True, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _named_as_loaded(cls, values: Any) -> Any:
        compressor = values.get("compressor") if isinstance(values, dict) else None
        if compressor is None:
            return values
        if not hasattr(compressor, "backbone"):
            raise ConfigError(
                f"compressor must be a ctxcompress.ContextCompressor, got {type(compressor).__name__}; pass "
                "one, or name a model to load"
            )
        return {**values, "model": compressor.backbone.name}

    @property
    def model_settings(self) -> dict[str, Any]:
        """The settings by which another object gets the same model and store."""
        return {name: getattr(self, name) for name in ModelSettings.model_fields}

    def _ready(self, model: str | None = None) -> ContextCompressor:
        """The compressor around this model, or around another one; loaded once however many threads ask."""
        if self.compressor is not None and model in {None, self.model}:
            return self.compressor
        from ctxcompress import ContextCompressor

        return ContextCompressor.shared(
            model or self.model, device=self.device, adapter=self.adapter, store=self.store
        )
