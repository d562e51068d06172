"""ctxcompress for LlamaIndex: answers from soft tokens, and a query engine that makes and reads them."""

from llama_index.response_synthesizers.ctxcompress.base import SoftContextSynthesizer
from llama_index.response_synthesizers.ctxcompress.engine import query_engine

__all__ = ["SoftContextSynthesizer", "query_engine"]
