"""ctxcompress for LangChain: retrieved documents in, the same documents out, each as short as it is worth."""

from langchain_ctxcompress.compressor import CtxCompressor

__all__ = ["CtxCompressor"]
