"""The few ways to fail. Every message says what was expected, what came, and what to do."""


class CtxCompressError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(CtxCompressError, ValueError):
    """A setting is out of its range, or two settings contradict each other."""


class InputError(CtxCompressError, ValueError):
    """Documents, a query, a budget or a file cannot be used as given."""


class ModelError(CtxCompressError):
    """A model, tokenizer or calibration cannot be found or loaded."""


class CheckpointError(CtxCompressError):
    """An adapter cannot be used: of another base or version, incomplete, edited, or holding NaN."""


class ServingError(CtxCompressError):
    """A server that generates cannot be reached, refuses a request, or answers what is no completion."""


class StoreError(CtxCompressError):
    """A store of encoded documents cannot be opened, read or written; what was acknowledged stays."""


class StoreWarning(UserWarning):
    """An entry of a store is damaged and counts as absent; encoding the document again mends it."""


class MissingExtraError(CtxCompressError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f'this needs the package "{package}"; install it with: pip install "ctxcompress[{extra}]"'
        )
