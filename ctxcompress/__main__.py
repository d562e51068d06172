"""`python -m ctxcompress` is the command `ctxcompress`."""

from ctxcompress.cli import app

app()
