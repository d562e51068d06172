"""Keeps pytest from importing a namespace package under a wrong name, and examples on their own."""

# pytest takes the outermost folder with an __init__.py for a module's top package: for it our
# `llama_index.postprocessor.ctxcompress.base` would be `ctxcompress.base`, a module of the library.
collect_ignore_glob = ["*/llama_index", "*/examples"]
