"""One paper, one file: how the stages are wired together."""
