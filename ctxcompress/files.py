"""Reading and writing files so that nothing is half there and nothing unreadable passes as text."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from ctxcompress.errors import InputError


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name and move it to `path`: readers see the old file or the new one.

    Raises:
        InputError: the folder cannot be written to.
    """
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = unfinished.open("xb")
    except OSError as error:
        raise InputError(f"{path.parent} must be a folder this process can write to, got: {error}") from error
    try:
        with stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        InputError: no such file, unreadable, binary, or in another encoding.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"a readable text file was expected at {path}, got: {error.strerror or error}"
        ) from error
    return decoded(content, str(path))


def decoded(content: bytes, name: str) -> str:
    """`content` as text; `name` is what the error calls it.

    Raises:
        InputError: binary, or not UTF-8.
    """
    if b"\0" in content:
        raise InputError(f"{name} must be UTF-8 text, got binary data (NUL bytes); pass .txt or .md files")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} must be UTF-8 text, got byte 0x{content[error.start]:02x} at position {error.start}; "
            "convert it, for example with: iconv -t UTF-8"
        ) from error
