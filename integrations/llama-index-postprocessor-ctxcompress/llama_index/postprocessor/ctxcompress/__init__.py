"""ctxcompress for LlamaIndex: retrieved nodes in, the same nodes out, each as short as it is worth."""

from llama_index.postprocessor.ctxcompress.base import CtxCompressPostprocessor

__all__ = ["CtxCompressPostprocessor"]
