"""A folder of packed documents: SQLite's rows, and the shards of tensors they point into.

    FOLDER/store.sqlite               index: one row per document: where its bytes are, their checksum
    FOLDER/shards/NAME.safetensors    all documents of one `add`; written once, never changed

A shard is whole and on the disk before the rows that point into it are committed: a crash leaves at most a
file that nobody points to. SQLite's write lock is held from before the shard until after the commit, so
writers and collectors of all processes take turns. Every read from the disk checks the checksum.

SQLite's log needs a local disk: network file systems do not keep its locks.
"""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import threading
import uuid
import warnings
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from ctxcompress.errors import InputError, StoreError, StoreWarning
from ctxcompress.files import write_atomically
from ctxcompress.stored import PackedDocument, Row, row_of

LOCK_SECONDS = 60.0
SHARD_BYTES = 1 << 26  # what `gc` merges small shards up to
FORMAT = 1
_HANDLES = 64  # shards kept open
_PER_QUERY = 500  # keys in one SQL statement; SQLite allows 999 and more
_SEALED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
_SHARD = re.compile(r"[0-9a-f]{32}")
_COLUMNS = ", ".join(Row._fields)
_SCHEMA = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    f"CREATE TABLE entries ({_COLUMNS.replace('key', 'key PRIMARY KEY', 1)})",
    "CREATE TABLE quarantine (key PRIMARY KEY, shard, reason, noticed)",
    f"INSERT INTO meta VALUES ('format', '{FORMAT}')",
)


class _DamagedError(Exception):
    """An entry cannot be read back as it was put; the message says why."""


class ShardFolder:
    """Packed documents in a folder; threads and processes may share it, and forks may go on with it.

    Args:
        folder: made if missing, unless readonly.
        readonly: never write, not even to set aside what is damaged.

    Raises:
        StoreError: not a store, of another format, not writable, or readonly and not there.
    """

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
        """Let go of all files; what was added is durable with or without it."""
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
        """Number of documents."""
        with self._database() as db:
            return int(db.execute("SELECT count(*) FROM entries").fetchone()[0])

    def all_rows(self) -> list[Row]:
        """All rows in the order of their bytes."""
        with self._database() as db:
            found = db.execute(f"SELECT {_COLUMNS} FROM entries ORDER BY shard, first_token")
            return [Row(*row) for row in found]

    def rows(self, keys: Sequence[str]) -> dict[str, Row]:
        """Rows of the keys that are there, in the order of `keys`."""
        with self._database() as db:
            return _rows(db, keys)

    def load(self, row: Row, damaged: list[str] | None = None) -> PackedDocument | None:
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

    def _read(self, row: Row) -> PackedDocument:
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
            packed = PackedDocument(row.entry, row.dtype, row.ratio, row.chunks, tensors)
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

    def _quarantine(self, row: Row, reason: str) -> None:
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

    def add(self, packed: Sequence[PackedDocument], replace: bool) -> list[PackedDocument]:
        """Write what is not there yet, or all of it, as one shard; returns that, durable."""
        if not packed:
            return []
        with self._transaction() as (db, made):
            there = {} if replace else _rows(db, [one.entry.key for one in packed])
            new = [one for one in packed if one.entry.key not in there]
            if new:
                shard = self._write_shard(new, made)
                rows = [row_of(one, shard, *place) for one, place in zip(new, _places(new), strict=True)]
                marks = ", ".join("?" * len(Row._fields))
                db.executemany(f"INSERT OR REPLACE INTO entries VALUES ({marks})", rows)
        return new

    def move(self, loaded: Sequence[tuple[Row, PackedDocument]]) -> None:
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

    def scattered(self) -> Iterator[list[Row]]:
        """Rows that should share a new shard: of shards with gaps, and of small ones if there are several."""
        shards: dict[str, list[Row]] = defaultdict(list)
        for row in self.all_rows():
            shards[row.shard].append(row)
        groups: dict[tuple[str, int], list[str]] = defaultdict(list)
        for shard, rows in shards.items():
            groups[rows[0].dtype, rows[0].width].append(shard)
        for names in groups.values():
            small = {name for name in names if sum(row.bytes for row in shards[name]) < SHARD_BYTES // 2}
            gaps = {name for name in names if self._has_gaps(shards[name])}
            chosen = [name for name in names if name in gaps or (name in small and len(small) > 1)]
            batch: list[Row] = []
            size = 0
            for row in (row for name in chosen for row in shards[name]):
                batch.append(row)
                size += row.bytes
                if size >= SHARD_BYTES:
                    yield batch
                    batch, size = [], 0
            yield batch

    def _has_gaps(self, rows: Sequence[Row]) -> bool:
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
        """Size of all shard files."""
        total = 0
        with self._database():
            for path in self._shards.iterdir():
                with suppress(FileNotFoundError):  # another process may be collecting
                    total += path.stat().st_size
        return total

    def _path(self, name: str) -> Path:
        return self._shards / f"{name}.safetensors"

    def _write_shard(self, packed: Sequence[PackedDocument], made: list[str]) -> str:
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


def _places(packed: Sequence[PackedDocument]) -> list[tuple[int, int]]:
    """First window and first token of each document in a shard of them all."""
    windows = accumulate((one.windows for one in packed), initial=0)
    tokens = accumulate((one.entry.tokens for one in packed), initial=0)
    return list(zip(windows, tokens, strict=True))[:-1]


def _rows(db: sqlite3.Connection, keys: Sequence[str]) -> dict[str, Row]:
    """Rows of the keys that are there, in the order of `keys`."""
    found: dict[str, Row] = {}
    for start in range(0, len(keys), _PER_QUERY):
        some = keys[start : start + _PER_QUERY]
        marks = ", ".join("?" * len(some))
        for row in db.execute(f"SELECT {_COLUMNS} FROM entries WHERE key IN ({marks})", some):
            found[row[0]] = Row(*row)
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


_INHERITED: list[sqlite3.Connection] = []  # from before a fork; kept, because freeing them would close them
