"""Encoded documents, kept: encoded once at index time, read at every query.

    FOLDER/store.sqlite               index: one row per document: where its bytes are, their checksum
    FOLDER/shards/NAME.safetensors    all documents of one `put`; written once, never changed

A document's key is the hash of everything its encoding depends on, so an entry is never out of date. A shard
is whole and on the disk before the rows that point into it are committed: a crash leaves at most a file that
nobody points to. SQLite's write lock is held from before the shard until after the commit, so writers and
collectors of all processes take turns. Every read from the disk checks the checksum; what fails is absent.

SQLite's log needs a local disk: network file systems do not keep its locks.

Shapes: T tokens, M windows, D hidden.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sqlite3
import threading
import uuid
import warnings
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from ctxcompress.config import one_of
from ctxcompress.errors import ConfigError, InputError, StoreError, StoreWarning
from ctxcompress.files import write_atomically
from ctxcompress.types import Span

FORMAT = 1
LOCK_SECONDS = 60.0
SHARD_BYTES = 1 << 26  # what `gc` merges small shards up to
_HANDLES = 64  # shards kept open
_PER_QUERY = 500  # keys in one SQL statement; SQLite allows 999 and more
_SEALED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
_SHARD = re.compile(r"[0-9a-f]{32}")

StoreDtype = Literal["float32", "bfloat16", "float16", "int8"]
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """Unit of allocation.

    Attributes:
        span: half-open range of characters in the document's text.
        tokens: of the chunk; the chunks' tokens sum to the document's.
        nll: mean NLL of its tokens, nats; NaN when it was not computed.
        log2_ratio: what the ratio head predicts.
    """

    span: Span
    tokens: int
    nll: float
    log2_ratio: float


@dataclass(frozen=True, slots=True, eq=False)
class StoredDocument:
    """One document as the encoder left it: all that queries need, whatever their budget.

    Attributes:
        chunks: in order.
        ids_T: int32 token ids.
        states_MD: float32 encoder states, means over windows of the finest ratio, chunk after chunk;
            M may be 0.
        counts_M: int32 tokens behind each mean.
        ratio: the finest ratio.
    """

    chunks: tuple[StoredChunk, ...]
    ids_T: Tensor
    states_MD: Tensor
    counts_M: Tensor
    ratio: int


@dataclass(frozen=True, slots=True)
class StoreEntry:
    """What a store knows of a document without loading it.

    Attributes:
        key: see `store_key`.
        fingerprint: of the compressor that encoded it.
        tokens: of the document.
        bytes: its tensors take.
        created: when it was put, UTC, ISO 8601.
    """

    key: str
    fingerprint: str
    tokens: int
    bytes: int
    created: str


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


class _Row(NamedTuple):
    """One line of the index; the fields are the table's columns."""

    key: str
    fingerprint: str
    created: str
    bytes: int
    shard: str
    dtype: str
    ratio: int
    width: int
    first_window: int
    windows: int
    first_token: int
    tokens: int
    chunks: str
    checksum: str

    @property
    def entry(self) -> StoreEntry:
        return StoreEntry(self.key, self.fingerprint, self.tokens, self.bytes, self.created)


_COLUMNS = ", ".join(_Row._fields)
_SCHEMA = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    f"CREATE TABLE entries ({_COLUMNS.replace('key', 'key PRIMARY KEY', 1)})",
    "CREATE TABLE quarantine (key PRIMARY KEY, shard, reason, noticed)",
    f"INSERT INTO meta VALUES ('format', '{FORMAT}')",
)


class _DamagedError(Exception):
    """An entry cannot be read back as it was put; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class _Packed:
    """A document as it lies on the disk: states rounded, chunks as JSON."""

    entry: StoreEntry
    dtype: str
    ratio: int
    chunks: str
    tensors: Mapping[str, Tensor]

    @property
    def width(self) -> int:
        return self.tensors["states"].shape[1]

    @property
    def windows(self) -> int:
        return len(self.tensors["states"])

    @property
    def memory(self) -> int:
        """Bytes it takes in memory; the constant is about what its Python objects need."""
        return self.entry.bytes + len(self.chunks) + 1024

    def checksum(self) -> str:
        """Hash of the tensors, and of all of the row that gives them a meaning."""
        meaning = [self.entry.key, self.dtype, self.ratio, self.chunks]
        digest = hashlib.blake2b(json.dumps(meaning).encode(), digest_size=16)
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.view(torch.uint8).flatten().numpy().data)
        return digest.hexdigest()

    def unpacked(self) -> StoredDocument:
        """The document, in tensors of its own."""
        states_MD = self.tensors["states"].to(torch.float32, copy=True)
        if "scales" in self.tensors:
            states_MD.mul_(self.tensors["scales"][:, None])
        chunks = tuple(
            StoredChunk((start, stop), tokens, nll, log2_ratio)
            for start, stop, tokens, nll, log2_ratio in json.loads(self.chunks)
        )
        ids_T, counts_M = self.tensors["ids"].clone(), self.tensors["counts"].clone()
        return StoredDocument(chunks, ids_T, states_MD, counts_M, self.ratio)


class _Memory:
    """Packed documents by key; the least recently used leave when there are more than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[str, _Packed] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    def get(self, key: str) -> _Packed | None:
        with self._lock:
            packed = self._held.get(key)
            if packed is not None:
                self._held.move_to_end(key)
            return packed

    def add(self, packed: _Packed) -> None:
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

    def all(self) -> list[_Packed]:
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
        self._index = None if folder is None else _Index(Path(folder), readonly)
        _STORES.add(self)

    def __enter__(self) -> SoftTokenStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder; what was put is durable with or without it."""
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
            _pack(key, document, self.dtype, fingerprint, created) for key, document in documents.items()
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
        if self._index is not None:
            self._index.after_fork()


class _Index:
    """The folder: SQLite's rows and the shards they point into."""

    def __init__(self, folder: Path, readonly: bool) -> None:
        self._folder = folder
        self._shards = folder / "shards"
        self._readonly = readonly
        self._uri = (folder / "store.sqlite").absolute().as_uri() + "?mode=" + ("ro" if readonly else "rwc")
        self._lock = threading.Lock()
        self._closed = False
        self._opened: list[sqlite3.Connection] = []
        self._idle: list[sqlite3.Connection] = []
        self._handles: OrderedDict[str, tuple[tuple[int, int, int], Any]] = OrderedDict()
        # Without `close`: the last connection to go folds SQLite's log into the database.
        weakref.finalize(self, _close, self._opened)
        if readonly:
            self._find()
        else:
            self._make()
        self._check_format()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            self._handles.clear()
        _close(idle)

    def after_fork(self) -> None:
        """SQLite's connections must not be used on this side of a fork, nor closed: that could drop locks."""
        _INHERITED.extend(self._opened)
        self._opened.clear()
        self._idle = []
        self._lock = threading.Lock()

    # ------------------------------------------------------------------------------------------- opening

    def _find(self) -> None:
        if not (self._folder / "store.sqlite").exists():
            raise StoreError(
                f"a store was expected at {self._folder}, got no store.sqlite there; check the path, or open "
                "it without readonly=True to make one"
            )
        try:
            with closing(sqlite3.connect(self._uri, uri=True, timeout=LOCK_SECONDS)) as db:
                db.execute("SELECT 1 FROM sqlite_master").fetchone()
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise self._refused(error) from error
            # SQLite needs its log's two files even to read, and this folder does not let it make them.
            self._uri = self._uri.replace("?mode=ro", "?immutable=1")
            log = self._folder / "store.sqlite-wal"
            if log.exists() and log.stat().st_size:
                warnings.warn(
                    f"the newest entries of the store in {self._folder} may be absent: {log.name} cannot be "
                    "read without writing; open the store once from a process that may write",
                    StoreWarning,
                    stacklevel=4,
                )
        except sqlite3.Error as error:
            raise self._refused(error) from error

    def _make(self) -> None:
        try:
            self._shards.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refused(error) from error
        with self._database() as db:
            if not os.access(self._shards, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self._shards))
            if not _tables(db):
                db.execute("PRAGMA journal_mode = WAL")
                self._fill()
            _sync(self._folder.absolute().parent)
            _sync(self._folder)

    def _fill(self) -> None:
        with self._transaction() as (db, _):
            if not _tables(db):  # asked again: two processes may make the same store
                for statement in _SCHEMA:
                    db.execute(statement)

    def _check_format(self) -> None:
        with self._database() as db:
            found = db.execute("SELECT value FROM meta WHERE name = 'format'").fetchone()
        if found != (str(FORMAT),):
            raise StoreError(
                f"the store in {self._folder} has format {found and found[0]}, this version reads {FORMAT}; "
                "update ctxcompress, or choose another folder: documents are encoded again"
            )

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A connection that no other thread uses meanwhile; failures of SQLite and the disk become ours."""
        with self._lock:
            if self._closed:
                raise StoreError(
                    f"an open store was expected, got that in {self._folder} closed; open it again"
                )
            db = self._idle.pop() if self._idle else None
        try:
            if db is None:
                db = sqlite3.connect(
                    self._uri, uri=True, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False
                )
                self._opened.append(db)
                db.execute("PRAGMA synchronous = FULL")
            yield db
        except (sqlite3.Error, OSError) as error:
            raise self._refused(error) from error
        finally:
            with self._lock:
                if db is not None and not self._closed:
                    self._idle.append(db)
                    db = None
            _close([db] if db is not None else [])

    @contextmanager
    def _transaction(self) -> Iterator[tuple[sqlite3.Connection, list[str]]]:
        """All or nothing, alone among the writers of all processes.

        Yields:
            The connection, and a list for the names of shards made inside, which go if the rows do not come.
        """
        made: list[str] = []
        with self._database() as db:
            try:
                db.execute("BEGIN IMMEDIATE")
                yield db, made
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                # Asked, not assumed: an interrupt may come when the rows are already there.
                with suppress(sqlite3.Error, OSError):
                    for name in made:
                        if not db.execute("SELECT 1 FROM entries WHERE shard = ?", (name,)).fetchone():
                            self._path(name).unlink(missing_ok=True)
                raise

    def _refused(self, error: Exception) -> StoreError:
        text = str(error)
        sealed = getattr(error, "errno", None) in _SEALED or "readonly" in text or "unable to open" in text
        if "locked" in text:
            return StoreError(
                f"writing to the store in {self._folder} needs its lock, got none within {LOCK_SECONDS:g} "
                "seconds; another process is writing: wait for it or end it, and try again"
            )
        if sealed:
            return StoreError(
                f"{self._folder} must be a folder this process can write to, got: {text}; to read a store "
                "that is there, open it with readonly=True"
            )
        if isinstance(error, sqlite3.Error) and "full" not in text and "I/O" not in text:
            return StoreError(
                f"store.sqlite in {self._folder} must be the index of a store, got: {text}; choose another "
                "folder, or remove this one: documents are encoded again"
            )
        return StoreError(
            f"the store in {self._folder} must be able to read and write, got: {text}; nothing of this call "
            "is kept, all earlier entries are: check the disk's free space and try again"
        )

    # ------------------------------------------------------------------------------------------- reading

    def count(self) -> int:
        with self._database() as db:
            return int(db.execute("SELECT count(*) FROM entries").fetchone()[0])

    def all_rows(self) -> list[_Row]:
        """All rows in the order of their bytes."""
        with self._database() as db:
            found = db.execute(f"SELECT {_COLUMNS} FROM entries ORDER BY shard, first_token")
            return [_Row(*row) for row in found]

    def rows(self, keys: Sequence[str]) -> dict[str, _Row]:
        with self._database() as db:
            return _rows(db, keys)

    def load(self, row: _Row, damaged: list[str] | None = None) -> _Packed | None:
        """A document from the disk.

        Args:
            row: where it was a moment ago.
            damaged: gets the key if the bytes there are not those that were put.

        Returns:
            None if it is damaged, which is reported, or has just left.
        """
        while True:
            try:
                return self._read(row)
            except _DamagedError as error:
                # Before the entry is blamed: `gc` may have moved it into another shard.
                current = self.rows([row.key]).get(row.key)
                if current is None:
                    return None
                if current == row:
                    self._quarantine(row, str(error))
                    if damaged is not None:
                        damaged.append(row.key)
                    return None
                row = current

    def _read(self, row: _Row) -> _Packed:
        places = {"states": (row.first_window, row.windows), "counts": (row.first_window, row.windows)}
        places["ids"] = (row.first_token, row.tokens)
        if row.dtype == "int8":
            places["scales"] = places["states"]
        handle = self._handle(row.shard)
        try:
            # Copies: a view would keep the shard mapped, and could change after it was checked.
            tensors = {
                name: handle.get_slice(name)[start : start + length].clone()
                for name, (start, length) in places.items()
            }
            packed = _Packed(row.entry, row.dtype, row.ratio, row.chunks, tensors)
            # Slices stop at the end of a tensor without a word.
            lengths = packed.windows, len(tensors["ids"])
            if lengths != (row.windows, row.tokens) or packed.checksum() != row.checksum:
                raise _DamagedError("its bytes do not have the checksum they were put with")
        except (SafetensorError, TypeError, ValueError) as error:
            raise _DamagedError(str(error)) from error
        return packed

    def _handle(self, name: str) -> Any:
        """An open shard, kept open while the file stays the same: a mapped file must not shrink."""
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise _DamagedError(f"{name!r} is not the name of a shard")
        path = self._path(name)
        try:
            with path.open("rb") as stream:
                status = os.fstat(stream.fileno())
        except FileNotFoundError as error:
            raise _DamagedError(f"its shard {path.name} is missing") from error
        except OSError as error:
            raise StoreError(
                f"{path} must be a file this process can read, got: {error}; mend its permissions or the disk"
            ) from error
        identity = (status.st_ino, status.st_size, status.st_mtime_ns)
        with self._lock:
            known, handle = self._handles.pop(name, (None, None))
        if known != identity:
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise _DamagedError(f"its shard {path.name} cannot be read: {error}") from error
        with self._lock:
            self._handles[name] = identity, handle
            while len(self._handles) > _HANDLES:
                self._handles.popitem(last=False)
        return handle

    def _quarantine(self, row: _Row, reason: str) -> None:
        outcome = "its document must be encoded again"
        if not self._readonly:
            noticed = datetime.now(timezone.utc).isoformat(timespec="seconds")
            try:
                with self._transaction() as (db, _):
                    place = row.key, row.shard
                    if db.execute("DELETE FROM entries WHERE key IS ? AND shard IS ?", place).rowcount:
                        values = (*place, reason, noticed)
                        db.execute("INSERT OR REPLACE INTO quarantine VALUES (?, ?, ?, ?)", values)
            except StoreError as error:
                outcome += f", and it could not be set aside: {error}"
        warnings.warn(
            f"entry {row.key} of the store in {self._folder} is damaged: {reason}; {outcome}",
            StoreWarning,
            stacklevel=4,
        )

    # ------------------------------------------------------------------------------------------- writing

    def add(self, packed: Sequence[_Packed], replace: bool) -> list[_Packed]:
        """Write what is not there yet, or all of it, as one shard; returns that, durable."""
        if not packed:
            return []
        with self._transaction() as (db, made):
            there = {} if replace else _rows(db, [one.entry.key for one in packed])
            new = [one for one in packed if one.entry.key not in there]
            if new:
                shard = self._write_shard(new, made)
                rows = [_row(one, shard, *place) for one, place in zip(new, _places(new), strict=True)]
                marks = ", ".join("?" * len(_Row._fields))
                db.executemany(f"INSERT OR REPLACE INTO entries VALUES ({marks})", rows)
        return new

    def move(self, loaded: Sequence[tuple[_Row, _Packed]]) -> None:
        """Write documents into a new shard and point their rows there."""
        if not loaded:
            return
        with self._transaction() as (db, made):
            packed = [one for _, one in loaded]
            shard = self._write_shard(packed, made)
            db.executemany(
                "UPDATE entries SET shard = ?, first_window = ?, first_token = ? WHERE key = ? AND shard = ?",
                [
                    (shard, *place, row.key, row.shard)
                    for (row, _), place in zip(loaded, _places(packed), strict=True)
                ],
            )

    def remove_others(self, keep: Collection[str]) -> int:
        """Drop the rows of compressors that are not in `keep`; returns how many."""
        with self._transaction() as (db, _):
            found = {fingerprint for (fingerprint,) in db.execute("SELECT DISTINCT fingerprint FROM entries")}
            return sum(
                db.execute("DELETE FROM entries WHERE fingerprint = ?", (fingerprint,)).rowcount
                for fingerprint in sorted(found - set(keep))
            )

    def scattered(self) -> Iterator[list[_Row]]:
        """Rows that should share a new shard: of shards with gaps, and of small ones if there are several."""
        shards: dict[str, list[_Row]] = defaultdict(list)
        for row in self.all_rows():
            shards[row.shard].append(row)
        groups: dict[tuple[str, int], list[str]] = defaultdict(list)
        for shard, rows in shards.items():
            groups[rows[0].dtype, rows[0].width].append(shard)
        for names in groups.values():
            small = {name for name in names if sum(row.bytes for row in shards[name]) < SHARD_BYTES // 2}
            gaps = {name for name in names if self._has_gaps(shards[name])}
            chosen = [name for name in names if name in gaps or (name in small and len(small) > 1)]
            batch: list[_Row] = []
            size = 0
            for row in (row for name in chosen for row in shards[name]):
                batch.append(row)
                size += row.bytes
                if size >= SHARD_BYTES:
                    yield batch
                    batch, size = [], 0
            yield batch

    def _has_gaps(self, rows: Sequence[_Row]) -> bool:
        """Whether a shard holds more than its rows need."""
        with suppress(_DamagedError, SafetensorError):
            handle = self._handle(rows[0].shard)
            windows, tokens = (handle.get_slice(name).get_shape()[0] for name in ("counts", "ids"))
            return bool(
                windows > sum(row.windows for row in rows) or tokens > sum(row.tokens for row in rows)
            )
        return True

    def sweep(self) -> None:
        """Delete files without a row; the lock keeps a writer's new shard from being one of them."""
        with self._transaction() as (db, _):
            needed = {self._path(name).name for (name,) in db.execute("SELECT DISTINCT shard FROM entries")}
            for path in self._shards.iterdir():
                if path.name not in needed and not path.is_dir():
                    with self._lock:
                        self._handles.pop(path.stem, None)  # an open file keeps its space
                    path.unlink(missing_ok=True)
            db.execute("DELETE FROM quarantine")  # last: it needs space, even to delete nothing

    def shard_bytes(self) -> int:
        total = 0
        with self._database():
            for path in self._shards.iterdir():
                with suppress(FileNotFoundError):  # another process may be collecting
                    total += path.stat().st_size
        return total

    def _path(self, name: str) -> Path:
        return self._shards / f"{name}.safetensors"

    def _write_shard(self, packed: Sequence[_Packed], made: list[str]) -> str:
        """Write documents into one file, durably; its name goes into `made` before anything is there."""
        name = uuid.uuid4().hex
        made.append(name)
        tensors = {tensor: torch.cat([one.tensors[tensor] for one in packed]) for tensor in packed[0].tensors}
        try:
            write_atomically(self._path(name), to_bytes(tensors))
        except InputError as error:
            cause = error.__cause__
            raise self._refused(cause if isinstance(cause, OSError) else error) from error
        _sync(self._shards)
        return name


def store_key(text: str, fingerprint: str, chunk_tokens: int, alignment: str) -> str:
    """Key of a document: the hash of all that its encoding depends on.

    Args:
        text: of the document.
        fingerprint: of the compressor.
        chunk_tokens: how the text was cut.
        alignment: of windows within chunks.

    Returns:
        SHA-256, 64 hexadecimal digits.
    """
    return hashlib.sha256(json.dumps([text, fingerprint, chunk_tokens, alignment]).encode()).hexdigest()


def _pack(key: str, document: StoredDocument, dtype: StoreDtype, fingerprint: str, created: str) -> _Packed:
    states_MD = document.states_MD.detach().to("cpu", torch.float32)
    tokens = sum(chunk.tokens for chunk in document.chunks)
    shapes = (states_MD.shape[:1], document.counts_M.shape, document.ids_T.shape)
    windows = torch.Size([len(states_MD)])
    if states_MD.ndim != 2 or not states_MD.shape[1] or shapes != (windows, windows, torch.Size([tokens])):
        raise InputError(
            f"document {key} must have states (M, D), counts (M,) and as many ids as its chunks have tokens "
            f"({tokens}), got shapes {tuple(states_MD.shape)}, {tuple(document.counts_M.shape)} and "
            f"{tuple(document.ids_T.shape)}; put it as the encoder made it"
        )
    tensors = {
        "counts": document.counts_M.detach().to("cpu", torch.int32, copy=True),
        "ids": document.ids_T.detach().to("cpu", torch.int32, copy=True),
    }
    if dtype == "int8":
        scales_M = states_MD.abs().amax(dim=1) / 127
        steps_M = torch.where(scales_M > 0, scales_M, 1.0)
        tensors["scales"] = scales_M
        tensors["states"] = (states_MD / steps_M[:, None]).round().clamp(-127, 127).to(torch.int8)
    else:
        tensors["states"] = states_MD.to(_DTYPES[dtype], memory_format=torch.contiguous_format, copy=True)
    if not torch.isfinite(tensors["scales" if dtype == "int8" else "states"]).all():
        raise InputError(
            f"states of document {key} must be finite in {dtype}, got NaN, infinity or values beyond its "
            "range; use bfloat16, or look for what made them"
        )
    chunks = [[*chunk.span, chunk.tokens, chunk.nll, chunk.log2_ratio] for chunk in document.chunks]
    size = sum(tensor.nbytes for tensor in tensors.values())
    entry = StoreEntry(key, fingerprint, tokens, size, created)
    return _Packed(entry, dtype, document.ratio, json.dumps(chunks), tensors)


def _row(packed: _Packed, shard: str, first_window: int, first_token: int) -> _Row:
    entry = packed.entry
    return _Row(
        key=entry.key,
        fingerprint=entry.fingerprint,
        created=entry.created,
        bytes=entry.bytes,
        shard=shard,
        dtype=packed.dtype,
        ratio=packed.ratio,
        width=packed.width,
        first_window=first_window,
        windows=packed.windows,
        first_token=first_token,
        tokens=entry.tokens,
        chunks=packed.chunks,
        checksum=packed.checksum(),
    )


def _places(packed: Sequence[_Packed]) -> list[tuple[int, int]]:
    """First window and first token of each document in a shard of them all."""
    windows = accumulate((one.windows for one in packed), initial=0)
    tokens = accumulate((one.entry.tokens for one in packed), initial=0)
    return list(zip(windows, tokens, strict=True))[:-1]


def _rows(db: sqlite3.Connection, keys: Sequence[str]) -> dict[str, _Row]:
    """Rows of the keys that are there, in the order of `keys`."""
    found: dict[str, _Row] = {}
    for start in range(0, len(keys), _PER_QUERY):
        some = keys[start : start + _PER_QUERY]
        marks = ", ".join("?" * len(some))
        for row in db.execute(f"SELECT {_COLUMNS} FROM entries WHERE key IN ({marks})", some):
            found[row[0]] = _Row(*row)
    return found


def _tables(db: sqlite3.Connection) -> bool:
    return db.execute("SELECT 1 FROM sqlite_master").fetchone() is not None


def _sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    if os.name == "nt":  # Windows cannot open folders, and needs no such call
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _close(connections: list[sqlite3.Connection]) -> None:
    while connections:
        connections.pop().close()


_STORES: weakref.WeakSet[SoftTokenStore] = weakref.WeakSet()
_INHERITED: list[sqlite3.Connection] = []  # from before a fork; kept, because freeing them would close them


def _after_fork() -> None:
    for store in list(_STORES):
        store._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
