"""ctxcompress for LlamaIndex: an LLM that reads soft tokens where a message holds references to them."""

from llama_index.llms.ctxcompress.base import CtxCompressLLM, SoftBlock

__all__ = ["CtxCompressLLM", "SoftBlock"]
