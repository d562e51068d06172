"""Compress retrieved context for LLMs: every document gets the tokens it is worth for the question.

Names load what they need when they are first used: importing this package loads neither torch nor a
framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctxcompress.backbone import Backbone
    from ctxcompress.calibration import Calibration
    from ctxcompress.config import AllocatorName, DACConfig, DASTConfig, Mode, SoftConfig
    from ctxcompress.decoder import Completion, Decoder, LocalDecoder
    from ctxcompress.display import BudgetTable
    from ctxcompress.errors import (
        CheckpointError,
        ConfigError,
        CtxCompressError,
        InputError,
        MissingExtraError,
        ModelError,
        ServingError,
        StoreError,
        StoreWarning,
    )
    from ctxcompress.methods.dac import DAC
    from ctxcompress.methods.dast import DAST
    from ctxcompress.pipeline import ContextCompressor
    from ctxcompress.prompt import question_content
    from ctxcompress.references import placeholder
    from ctxcompress.remote import VLLMDecoder
    from ctxcompress.soft import SoftCompressor
    from ctxcompress.store import SoftTokenStore
    from ctxcompress.types import (
        Answer,
        CompressedChunk,
        CompressedDocument,
        CompressionResult,
        Document,
        Order,
        SoftTokens,
        arranged,
    )
    from ctxcompress.vectors import faiss_index

__version__ = "0.1.0"

_HOMES = {
    "AllocatorName": "config",
    "Answer": "types",
    "Backbone": "backbone",
    "BudgetTable": "display",
    "Calibration": "calibration",
    "CompressedChunk": "types",
    "CompressedDocument": "types",
    "CompressionResult": "types",
    "CheckpointError": "errors",
    "Completion": "decoder",
    "ConfigError": "errors",
    "ContextCompressor": "pipeline",
    "CtxCompressError": "errors",
    "DAC": "methods.dac",
    "DACConfig": "config",
    "DAST": "methods.dast",
    "DASTConfig": "config",
    "Decoder": "decoder",
    "Document": "types",
    "InputError": "errors",
    "LocalDecoder": "decoder",
    "MissingExtraError": "errors",
    "Mode": "config",
    "ModelError": "errors",
    "Order": "types",
    "ServingError": "errors",
    "SoftCompressor": "soft",
    "SoftConfig": "config",
    "SoftTokenStore": "store",
    "SoftTokens": "types",
    "StoreError": "errors",
    "StoreWarning": "errors",
    "VLLMDecoder": "remote",
    "arranged": "types",
    "faiss_index": "vectors",
    "placeholder": "references",
    "question_content": "prompt",
}

__all__ = [
    "DAC",
    "DAST",
    "AllocatorName",
    "Answer",
    "Backbone",
    "BudgetTable",
    "Calibration",
    "CheckpointError",
    "Completion",
    "CompressedChunk",
    "CompressedDocument",
    "CompressionResult",
    "ConfigError",
    "ContextCompressor",
    "CtxCompressError",
    "DACConfig",
    "DASTConfig",
    "Decoder",
    "Document",
    "InputError",
    "LocalDecoder",
    "MissingExtraError",
    "Mode",
    "ModelError",
    "Order",
    "ServingError",
    "SoftCompressor",
    "SoftConfig",
    "SoftTokenStore",
    "SoftTokens",
    "StoreError",
    "StoreWarning",
    "VLLMDecoder",
    "__version__",
    "arranged",
    "faiss_index",
    "placeholder",
    "question_content",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
