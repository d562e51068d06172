"""Encoded documents, kept: encoded once at index time, read at every query.

A document's key is the hash of everything its encoding depends on, so an entry is never out of date. On the
disk entries survive crashes and carry checksums, see `ctxcompress.shards`; what fails its check is absent.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

from ctxcompress.config import one_of
from ctxcompress.errors import ConfigError, InputError, StoreError
from ctxcompress.references import References
from ctxcompress.shards import ShardFolder
from ctxcompress.stored import (
    PackedDocument,
    StoredDocument,
    StoreDtype,
    StoreEntry,
    pack,
)


@dataclass(frozen=True, slots=True)
class GcFigures:
    """What a collection did.

    Attributes:
        bytes_before: of all shard files, or of the memory.
        bytes_after: the same, afterwards.
        removed: entries of compressors that were not to be kept.
    """

    bytes_before: int
    bytes_after: int
    removed: int


class _Memory:
    """Packed documents by key; the least recently used leave when there are more than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[str, PackedDocument] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    def get(self, key: str) -> PackedDocument | None:
        with self._lock:
            packed = self._held.get(key)
            if packed is not None:
                self._held.move_to_end(key)
            return packed

    def add(self, packed: PackedDocument) -> None:
        with self._lock:
            self._remove(packed.entry.key)
            if packed.memory > self._limit:
                return
            self._held[packed.entry.key] = packed
            self.bytes += packed.memory
            while self.bytes > self._limit:
                self._remove(next(iter(self._held)))

    def remove(self, key: str) -> None:
        with self._lock:
            self._remove(key)

    def all(self) -> list[PackedDocument]:
        with self._lock:
            return list(self._held.values())

    def after_fork(self) -> None:
        """The lock may be held by a thread that this process does not have."""
        self._lock = threading.Lock()
        self.bytes = sum(packed.memory for packed in self._held.values())

    def _remove(self, key: str) -> None:
        packed = self._held.pop(key, None)
        if packed is not None:
            self.bytes -= packed.memory


class SoftTokenStore:
    """Encoded documents by key, on the disk behind a memory of bounded size, or in that memory only.

    One store may be shared by threads, and by processes that fork; several processes may open one folder.

    Args:
        folder: made if missing; None keeps documents in memory only, where the oldest leave when it is full.
        dtype: how states are rounded when they are put; "int8" scales each vector by its largest value.
            Entries keep the dtype they were put with.
        memory_bytes: most bytes of rounded documents that are held in memory.
        readonly: never write, not even to set aside what is damaged.

    Raises:
        ConfigError: an unknown dtype, negative memory, or a readonly store without a folder.
        StoreError: not a store, of another format, not writable, or readonly and not there.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        dtype: StoreDtype = "bfloat16",
        memory_bytes: int = 1 << 28,
        readonly: bool = False,
    ) -> None:
        if memory_bytes < 0:
            raise ConfigError(f"memory_bytes must be >= 0, got {memory_bytes}; 0 holds nothing in memory")
        if readonly and folder is None:
            raise ConfigError("a readonly store needs a folder, got None; give the folder of a store")
        self.dtype: StoreDtype = one_of("dtype", dtype, StoreDtype)
        self.readonly = readonly
        self._memory = _Memory(memory_bytes)
        self.references = References()
        self._index = None if folder is None else ShardFolder(Path(folder), readonly)
        _STORES.add(self)

    def __enter__(self) -> SoftTokenStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder, whose entries stay, and of all references, which expire."""
        self.references.clear()
        if self._index is not None:
            self._index.close()

    def __contains__(self, key: str) -> bool:
        return not self.missing([key])

    def __len__(self) -> int:
        return len(self._memory.all()) if self._index is None else self._index.count()

    def get(self, keys: Sequence[str]) -> dict[str, StoredDocument]:
        """The documents of those keys that are there, in the order of `keys`; states are float32.

        Raises:
            StoreError: the disk cannot be read. Damaged entries only warn, and are left out.
        """
        packed = {key: self._memory.get(key) for key in keys}
        if self._index is not None:
            for row in self._index.rows([key for key, held in packed.items() if held is None]).values():
                loaded = self._index.load(row)
                if loaded is not None:
                    packed[row.key] = loaded
                    self._memory.add(loaded)
        return {key: held.unpacked() for key, held in packed.items() if held is not None}

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` that `get` would leave out, each once; nothing is loaded, so damage goes unseen."""
        absent = [key for key in dict.fromkeys(keys) if self._memory.get(key) is None]
        if self._index is None:
            return absent
        found = self._index.rows(absent)
        return [key for key in absent if key not in found]

    def put(
        self, documents: Mapping[str, StoredDocument], *, fingerprint: str, replace: bool = False
    ) -> None:
        """Keep documents; with a folder they are durable when this returns.

        Args:
            documents: by key; see `store_key`. All states have one size.
            fingerprint: of the compressor that encoded them.
            replace: whether a document takes the place of one under its key; otherwise that stays as it is.

        Raises:
            InputError: parts of a document that do not fit each other, or states beyond the dtype.
            StoreError: readonly, not writable, or the disk is full; then nothing of this call is kept.
        """
        if self.readonly:
            raise StoreError(
                "writing needs a store that is not readonly, got readonly=True; open it without that"
            )
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        packed = [
            pack(key, document, self.dtype, fingerprint, created) for key, document in documents.items()
        ]
        widths = sorted({one.width for one in packed})
        if len(widths) > 1:
            raise InputError(
                f"the states of one call must have one size, got {widths}; put the documents of "
                "each compressor in a call of their own"
            )
        for one in packed if self._index is None else self._index.add(packed, replace):
            if replace or self._index is not None or self._memory.get(one.entry.key) is None:
                self._memory.add(one)

    def entries(self) -> list[StoreEntry]:
        """What is there, oldest first."""
        found = (
            [packed.entry for packed in self._memory.all()]
            if self._index is None
            else [row.entry for row in self._index.all_rows()]
        )
        return sorted(found, key=lambda entry: (entry.created, entry.key))

    def verify(self, progress: Callable[[str, int, int], None] | None = None) -> list[str]:
        """Read everything on the disk; damaged entries are set aside and their keys returned.

        Args:
            progress: told (name, entries done, entries in all).

        Raises:
            StoreError: the disk cannot be read.
        """
        damaged: list[str] = []
        if self._index is None:
            return damaged
        rows = self._index.all_rows()
        for done, row in enumerate(rows, 1):
            self._index.load(row, damaged)
            if progress is not None:
                progress("verifying", done, len(rows))
        for key in damaged:
            self._memory.remove(key)
        return damaged

    def gc(self, *, keep: Collection[str] | None = None) -> GcFigures:
        """Free space: drop what is damaged or not to be kept and files nobody points to; merge shards.

        Others may read and write at the same time.

        Args:
            keep: fingerprints of the compressors whose entries stay; None keeps all.

        Raises:
            StoreError: readonly, not writable, or the disk is full; then all that was to stay is there.
        """
        if self.readonly:
            raise StoreError(
                "collecting needs a store that is not readonly, got readonly=True; open it without that"
            )
        held = self._memory.all()
        others = [one for one in held if keep is not None and one.entry.fingerprint not in keep]
        for one in others:
            self._memory.remove(one.entry.key)
        if self._index is None:
            before, freed = (sum(one.entry.bytes for one in some) for some in (held, others))
            return GcFigures(before, before - freed, len(others))
        before = self._index.shard_bytes()
        removed = 0 if keep is None else self._index.remove_others(keep)
        self._index.sweep()  # before shards are merged too: that needs space
        for rows in self._index.scattered():
            loaded = ((row, self._index.load(row)) for row in rows)
            self._index.move([(row, packed) for row, packed in loaded if packed is not None])
        self._index.sweep()
        return GcFigures(before, self._index.shard_bytes(), removed)

    def _after_fork(self) -> None:
        self._memory.after_fork()
        self.references.after_fork()
        if self._index is not None:
            self._index.after_fork()


_STORES: weakref.WeakSet[SoftTokenStore] = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_STORES):
        store._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
