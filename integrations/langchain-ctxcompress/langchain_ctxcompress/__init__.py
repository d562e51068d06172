"""ctxcompress for LangChain: retrieved documents as short as they are worth, as text or as soft tokens."""

from langchain_ctxcompress.chains import create_soft_rag_chain
from langchain_ctxcompress.chat_models import ChatCtxCompress
from langchain_ctxcompress.compressor import CtxCompressor
from langchain_ctxcompress.prompts import SoftContextPrompt
from langchain_ctxcompress.retriever import CtxCompressRetriever

__all__ = [
    "ChatCtxCompress",
    "CtxCompressRetriever",
    "CtxCompressor",
    "SoftContextPrompt",
    "create_soft_rag_chain",
]
