"""Encoded documents on disk: what was put is what is read, or it is absent; never anything else."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

from ctxcompress import shards as module
from ctxcompress.cli import app
from ctxcompress.errors import ConfigError, InputError, StoreError, StoreWarning
from ctxcompress.store import SoftTokenStore
from ctxcompress.stored import StoredChunk, StoredDocument, StoreDtype, store_key

DTYPES: tuple[StoreDtype, ...] = get_args(StoreDtype)
KIND = "0123456789abcdef"


def document(seed: int, windows: int = 6, tokens: int = 11, width: int = 8) -> StoredDocument:
    """Two chunks of random states."""
    random = torch.Generator().manual_seed(seed)
    first = tokens // 2
    chunks = (
        StoredChunk((0, 20), first, 2.5 + seed, 1.25),
        StoredChunk((20, 45), tokens - first, float("nan"), -0.1),
    )
    states_MD = torch.randn(windows, width, generator=random) * 10.0 ** (seed % 5 - 2)
    counts_M = torch.randint(1, 3, (windows,), generator=random, dtype=torch.int32)
    ids_T = torch.randint(0, 50_000, (tokens,), generator=random, dtype=torch.int32)
    return StoredDocument(chunks, ids_T, states_MD, counts_M, 2)


def documents(*seeds: int) -> dict[str, StoredDocument]:
    return {f"key {seed}": document(seed) for seed in seeds}


def same(got: StoredDocument, expected: StoredDocument) -> bool:
    """Bit for bit, NaN included."""
    return (
        repr(got.chunks) == repr(expected.chunks)
        and got.ratio == expected.ratio
        and all(
            ours.dtype == theirs.dtype and torch.equal(ours, theirs)
            for ours, theirs in (
                (got.ids_T, expected.ids_T),
                (got.states_MD, expected.states_MD),
                (got.counts_M, expected.counts_M),
            )
        )
    )


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "shards").iterdir())


def execute(folder: Path, statement: str, *values: Any) -> list[tuple[Any, ...]]:
    """Change the index behind the store's back."""
    db = sqlite3.connect(folder / "store.sqlite")
    try:
        with db:
            return db.execute(statement, values).fetchall()
    finally:
        db.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "store"


@pytest.fixture
def filled(folder: Path) -> Path:
    """Two shards with two documents each, in float32."""
    with SoftTokenStore(folder, dtype="float32") as store:
        store.put(documents(1, 2), fingerprint=KIND)
        store.put(documents(3, 4), fingerprint="another")
    return folder


# ---------------------------------------------------------------------------------------- put and get


def test_keys_depend_on_all_four_and_run_nothing_together() -> None:
    base = ("text", "print", 256, "start")
    others = [
        ("text2", "print", 256, "start"), ("text", "2print", 256, "start"), ("text", "print", 25, "start"),
        ("text", "print", 256, "end"), ("textp", "rint", 256, "start"), ('text", "', "print", 256, "start"),
        ("\ud800", "print", 256, "start"), ("\\ud800", "print", 256, "start"),
    ]  # fmt: skip
    keys = {store_key(*arguments) for arguments in (base, *others)}
    assert len(keys) == 9
    assert all(len(key) == 64 and set(key) <= set("0123456789abcdef") for key in keys)
    # sha256 of ["text", "print", 256, "start"]: stores outlive versions
    assert store_key(*base) == "a9055c6dd7c15087eca325f843a85bb6d0b3c0fe543ed11a9c3d7056d8356d82"


chunk = st.builds(
    StoredChunk,
    span=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
    tokens=st.integers(0, 5),
    nll=st.floats(),
    log2_ratio=st.floats(allow_nan=False),
)
value = st.floats(-1000, 1000, width=32) | st.sampled_from([0.0, -0.0, 1e-45, 1e-38])


@st.composite
def encoded(draw: st.DrawFn, width: int) -> StoredDocument:
    chunks = tuple(draw(st.lists(chunk, max_size=3)))
    tokens = sum(one.tokens for one in chunks)
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=tokens, max_size=tokens))
    rows = draw(st.lists(st.lists(value, min_size=width, max_size=width), max_size=4))
    counts = draw(st.lists(st.integers(0, 64), min_size=len(rows), max_size=len(rows)))
    return StoredDocument(
        chunks,
        torch.tensor(ids, dtype=torch.int32),
        torch.tensor(rows, dtype=torch.float32).reshape(-1, width),
        torch.tensor(counts, dtype=torch.int32),
        draw(st.integers(1, 64)),
    )


def rounded(states_MD: torch.Tensor, dtype: StoreDtype) -> torch.Tensor:
    """What a dtype leaves of states, row by row in plain Python for int8."""
    if dtype != "int8":
        return states_MD.to(getattr(torch, dtype)).float()
    rows = []
    for row in states_MD:
        scale = row.abs().max() / 127
        steps = [round((value / scale).item()) if scale > 0 else 0 for value in row]
        rows.append(torch.tensor([float(min(max(step, -127), 127)) for step in steps]) * scale)
    return torch.stack(rows) if rows else states_MD


@settings(max_examples=int(os.environ.get("CTXCOMPRESS_MAX_EXAMPLES", "60")), deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), width=st.integers(1, 4))
def test_round_trip(data: st.DataObject, dtype: StoreDtype, width: int) -> None:
    put = {str(number): one for number, one in enumerate(data.draw(st.lists(encoded(width), max_size=3)))}
    expected = {
        key: StoredDocument(d.chunks, d.ids_T, rounded(d.states_MD, dtype), d.counts_M, d.ratio)
        for key, d in put.items()
    }
    with tempfile.TemporaryDirectory() as name:
        with SoftTokenStore(name, dtype=dtype) as store, SoftTokenStore(dtype=dtype) as memory:
            store.put(put, fingerprint=KIND)
            memory.put(put, fingerprint=KIND)
            views = [store.get(list(put)), memory.get(list(put))]
        with SoftTokenStore(name, memory_bytes=0, readonly=True) as reopened:
            views.append(reopened.get(list(put)))
    for view in views:
        assert view.keys() == expected.keys()
        assert all(same(view[key], expected[key]) for key in expected)


def test_int8_is_within_half_a_step_of_each_vector() -> None:
    one = document(4, windows=50)
    with SoftTokenStore(dtype="int8") as store:
        store.put({"key": one}, fingerprint=KIND)
        got = store.get(["key"])["key"]
    half_M = one.states_MD.abs().amax(dim=1) / 254
    assert ((got.states_MD - one.states_MD).abs() <= half_M[:, None] * 1.001).all()


def test_absent_keys_are_left_out_and_order_is_that_of_the_keys(filled: Path) -> None:
    with SoftTokenStore(filled) as store:
        assert list(store.get(["key 4", "none", "key 1", "key 4"])) == ["key 4", "key 1"]
        assert store.get([]) == {}
        assert store.missing(["none", "key 2", "none", "nothing"]) == ["none", "nothing"]
        assert "key 3" in store
        assert "none" not in store
        assert len(store) == 4
        many = [f"absent {number}" for number in range(1200)]
        assert list(store.get([*many, "key 2"])) == ["key 2"]
        assert store.missing([*many, "key 2"]) == many


def test_what_is_returned_is_the_callers_own() -> None:
    put = documents(1)
    with SoftTokenStore(dtype="float32") as store:
        store.put(put, fingerprint=KIND)
        for one in (put["key 1"], store.get(["key 1"])["key 1"]):
            for tensor in (one.states_MD, one.ids_T, one.counts_M):
                tensor.zero_()
        assert same(store.get(["key 1"])["key 1"], document(1))


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_first_of_two_with_one_key_stays(folder: Path, on_disk: bool) -> None:
    with SoftTokenStore(folder if on_disk else None, dtype="float32") as store:
        store.put({"key": document(1)}, fingerprint=KIND)
        store.put({"key": document(2), "other": document(3)}, fingerprint="another")
        got = store.get(["key", "other"])
        assert same(got["key"], document(1))
        assert same(got["other"], document(3))
        assert [entry.fingerprint for entry in store.entries()] in ([KIND, "another"], ["another", KIND])
        if on_disk:
            store.put({"key": document(2)}, fingerprint=KIND)
            assert len(shards(folder)) == 2  # nothing new, nothing written


def test_entries_keep_their_dtype(folder: Path) -> None:
    for seed, dtype in enumerate(DTYPES):
        with SoftTokenStore(folder, dtype=dtype) as store:
            store.put(documents(seed), fingerprint=KIND)
    with SoftTokenStore(folder, dtype="int8") as store:
        got = store.get([f"key {seed}" for seed in range(4)])
    for seed, dtype in enumerate(DTYPES):
        assert torch.equal(got[f"key {seed}"].states_MD, rounded(document(seed).states_MD, dtype))


def test_entries_tell_what_is_there(filled: Path) -> None:
    with SoftTokenStore(filled) as store:
        entries = store.entries()
    assert sorted((entry.key, entry.fingerprint, entry.tokens) for entry in entries) == [
        ("key 1", KIND, 11), ("key 2", KIND, 11), ("key 3", "another", 11), ("key 4", "another", 11),
    ]  # fmt: skip
    # 6 windows of 8 float32 and an int32 count, 11 int32 ids
    assert {entry.bytes for entry in entries} == {6 * 8 * 4 + 6 * 4 + 11 * 4}
    assert all(entry.created.endswith("+00:00") for entry in entries)


# --------------------------------------------------------------------------------------------- memory


def test_memory_keeps_the_latest_used_within_its_limit() -> None:
    with SoftTokenStore(dtype="float32") as one:
        one.put(documents(1), fingerprint=KIND)
        size = one._memory.bytes
    store = SoftTokenStore(dtype="float32", memory_bytes=3 * size + size // 2)
    for seed in (1, 2, 3):
        store.put(documents(seed), fingerprint=KIND)
    store.get(["key 1"])
    store.put(documents(4), fingerprint=KIND)
    assert store.missing([f"key {seed}" for seed in range(1, 5)]) == ["key 2"]
    assert store._memory.bytes <= 3 * size + size // 2
    store.put({"huge": document(1, windows=5000)}, fingerprint=KIND)
    assert len(store) == 3  # it does not fit, and pushes nothing out
    assert "huge" not in store


def test_a_second_read_does_not_touch_the_disk(filled: Path) -> None:
    with SoftTokenStore(filled) as store:
        first = store.get(["key 1"])["key 1"]
        shutil.rmtree(filled / "shards")
        assert same(store.get(["key 1"])["key 1"], first)


# --------------------------------------------------------------------------------------------- damage


def lost(filled: Path, reason: str, *keys: str) -> None:
    """Reading warns and leaves `keys` out; putting them again mends the store."""
    everything = [f"key {seed}" for seed in range(1, 5)]
    with SoftTokenStore(filled, readonly=True) as store:
        with pytest.warns(StoreWarning, match=reason):
            assert set(store.get(everything)) == set(everything) - set(keys)
        assert len(store) == 4  # nothing was written
    with SoftTokenStore(filled, dtype="float32") as store:
        with pytest.warns(StoreWarning, match=reason):
            assert set(store.get(everything)) == set(everything) - set(keys)
        assert store.missing(everything) == sorted(keys)
        assert sorted(key for (key,) in execute(filled, "SELECT key FROM quarantine")) == sorted(keys)
        store.put(documents(1, 2, 3, 4), fingerprint=KIND)
    with SoftTokenStore(filled) as store:
        got = store.get(everything)
        assert all(same(got[f"key {seed}"], document(seed)) for seed in range(1, 5))
        assert store.verify() == []


def home_of(filled: Path, key: str) -> Path:
    ((name,),) = execute(filled, "SELECT shard FROM entries WHERE key = ?", key)
    return filled / "shards" / f"{name}.safetensors"


@pytest.mark.parametrize("tensor", ["states", "counts", "ids"])
def test_a_flipped_bit_is_noticed(filled: Path, tensor: str) -> None:
    path = home_of(filled, "key 2")
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    _, end = json.loads(content[8 : 8 + header])[tensor]["data_offsets"]
    content[8 + header + end - 1] ^= 1  # the last byte of the second document
    path.write_bytes(content)
    lost(filled, "is damaged: its bytes", "key 2")


def test_another_dtype_in_the_header_is_noticed(filled: Path) -> None:
    path = home_of(filled, "key 3")
    content = path.read_bytes()
    assert content.count(b"I32") == 2
    path.write_bytes(content.replace(b"I32", b"F32"))  # the bytes of all tensors stay what they were
    lost(filled, "damaged", "key 3", "key 4")


def test_a_missing_shard(filled: Path) -> None:
    home_of(filled, "key 1").unlink()
    lost(filled, "its shard .* is missing; its document must be encoded again", "key 1", "key 2")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_shard(filled: Path, kept: int) -> None:
    path = home_of(filled, "key 3")
    os.truncate(path, kept if kept >= 0 else path.stat().st_size + kept)
    lost(filled, "cannot be read", "key 3", "key 4")


def test_a_shard_that_shrinks_while_it_is_open(filled: Path) -> None:
    with SoftTokenStore(filled, memory_bytes=0) as store:
        assert len(store.get(["key 3"])) == 1
        os.truncate(home_of(filled, "key 3"), 50)  # reading the mapped file would kill the process
        with pytest.warns(StoreWarning, match="cannot be read"):
            assert store.get(["key 3"]) == {}


@pytest.mark.parametrize(
    ("column", "forged"),
    [
        ("shard", "../../secret"), ("shard", "/etc/passwd"), ("shard", None), ("shard", 7),
        ("first_window", 1), ("first_token", -5), ("windows", 10**15), ("tokens", "x"), ("ratio", 3),
        ("chunks", "[[0, 1, 11, 0.5, 0.5]]"), ("chunks", "no JSON"), ("dtype", "float16"), ("dtype", "int8"),
        ("checksum", None), ("key", "key 9"),
    ],
)  # fmt: skip
def test_an_edited_row_is_noticed(filled: Path, column: str, forged: object) -> None:
    real = home_of(filled, "key 2")
    # Where "../../secret" points there is a good copy: only its place is wrong.
    shutil.copy(real, filled.parent / "secret.safetensors")
    execute(filled, f"UPDATE entries SET {column} = ? WHERE key = 'key 2'", forged)
    key = str(forged) if column == "key" else "key 2"
    with SoftTokenStore(filled, memory_bytes=0) as store:
        with pytest.warns(StoreWarning, match=f"{key} .* is damaged"):
            assert set(store.get(["key 1", key])) == {"key 1"}
        assert len(store) == 3


def test_verify_reads_everything_and_sets_aside_what_is_damaged(filled: Path) -> None:
    with SoftTokenStore(filled) as store:
        store.get(["key 1", "key 3"])
        home_of(filled, "key 3").unlink()
        told: list[tuple[str, int, int]] = []
        with pytest.warns(StoreWarning):
            assert sorted(store.verify(lambda *state: told.append(state))) == ["key 3", "key 4"]
        assert told == [("verifying", done, 4) for done in (1, 2, 3, 4)]
        assert store.missing(["key 1", "key 3"]) == ["key 3"]  # although it was in memory
        assert store.verify() == []
    assert SoftTokenStore().verify() == []


def test_files_that_cannot_be_opened_now_are_not_called_damaged(filled: Path) -> None:
    resource = pytest.importorskip("resource")
    with SoftTokenStore(filled) as store:
        assert len(store) == 4
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken = [os.open(os.devnull, os.O_RDONLY)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 1, hard))
        try:
            with pytest.raises(StoreError, match="Too many open files"):
                store.get(["key 1"])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            os.close(taken[0])
        assert len(store.get(["key 1", "key 2"])) == 2


# ------------------------------------------------------------------------------------------------- gc


def test_gc_merges_removes_and_leaves_every_byte_as_it_was(filled: Path) -> None:
    with SoftTokenStore(filled, dtype="int8") as store:
        store.put(documents(5), fingerprint=KIND)
        store.put({"wide": document(6, width=9), "empty": document(7, windows=0, width=9)}, fingerprint=KIND)
        (filled / "shards" / "unfinished").write_bytes(b"x" * 1000)
        (filled / "shards" / f"{'0' * 32}.safetensors").write_bytes(b"x" * 1000)
        wanted = ["key 1", "key 2", "key 5", "wide", "empty"]
        before = store.get(wanted)
        figures = store.gc(keep=[KIND])
        assert figures.removed == 2
        assert figures.bytes_after == sum(path.stat().st_size for path in shards(filled))
        assert figures.bytes_after < figures.bytes_before - 2000
        assert sorted(store.missing([*wanted, "key 3", "key 4"])) == ["key 3", "key 4"]
    # float32, int8 of the same size, int8 of another size
    assert len(shards(filled)) == 3
    with SoftTokenStore(filled) as store:
        after = store.get(wanted)
        assert all(same(after[key], before[key]) for key in wanted)
        names = shards(filled)
        figures = store.gc()
        assert (figures.removed, figures.bytes_before) == (0, figures.bytes_after)
        assert shards(filled) == names  # nothing to do, nothing rewritten


def test_gc_joins_small_shards_up_to_a_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SoftTokenStore(folder, dtype="float32") as store:
        for seed in range(10):
            store.put(documents(seed), fingerprint=KIND)
        monkeypatch.setattr(module, "SHARD_BYTES", 3 * store.entries()[0].bytes)
        store.gc()
        sizes = sorted(len(load_file(path)["counts"]) // 6 for path in shards(folder))
        assert sizes == [1, 3, 3, 3]
        assert store.verify() == []
        assert len(store) == 10


def test_gc_closes_gaps(folder: Path) -> None:
    with SoftTokenStore(folder, dtype="float32") as store:
        store.put(documents(1, 2, 3), fingerprint=KIND)
        execute(folder, "UPDATE entries SET fingerprint = 'another' WHERE key = 'key 2'")
        assert store.gc(keep={KIND}).removed == 1
        (shard,) = shards(folder)
        assert len(load_file(shard)["counts"]) == 12
        assert store.verify() == []


def test_gc_forgets_what_is_quarantined(filled: Path) -> None:
    home_of(filled, "key 1").write_bytes(b"junk")
    with SoftTokenStore(filled) as store:
        with pytest.warns(StoreWarning):
            assert store.get(["key 1"]) == {}
        with pytest.warns(StoreWarning):
            store.gc()  # meets the other entry of that shard
        assert store.verify() == []
        assert sorted(entry.key for entry in store.entries()) == ["key 3", "key 4"]
    assert execute(filled, "SELECT * FROM quarantine") == []
    assert len(shards(filled)) == 1


def test_gc_of_a_store_in_memory() -> None:
    store = SoftTokenStore(dtype="float32")
    store.put(documents(1), fingerprint=KIND)
    store.put(documents(2), fingerprint="another")
    figures = store.gc(keep=["another"])
    assert (figures.removed, figures.bytes_after) == (1, figures.bytes_before // 2)
    assert [entry.key for entry in store.entries()] == ["key 2"]


def test_readers_never_miss_an_entry_while_gc_moves_it(folder: Path) -> None:
    keys = [f"key {seed}" for seed in range(6)]
    reader = SoftTokenStore(folder, dtype="float32", memory_bytes=0)
    failures: list[object] = []
    finished = threading.Event()

    def read() -> None:
        while not finished.is_set():
            try:
                got = reader.get(keys)
                failures.extend(key for key in keys if not same(got[key], document(int(key[4:]))))
            except Exception as error:
                failures.append(error)

    with SoftTokenStore(folder, dtype="float32") as store:
        store.put(documents(*range(6)), fingerprint=KIND)
        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        for round_ in range(15):
            store.put({f"extra {round_}": document(9)}, fingerprint=str(round_))
            store.gc(keep=[KIND, str(round_)])
        finished.set()
        for thread in threads:
            thread.join()
    reader.close()
    assert failures == []
    assert len(shards(folder)) == 1


# --------------------------------------------------------------------------- threads, processes, forks


def test_threads_share_one_store(folder: Path) -> None:
    failures: list[object] = []

    def work(store: SoftTokenStore, number: int) -> None:
        try:
            for seed in range(5):
                store.put(documents(seed, 10 * number + seed), fingerprint=KIND)
                got = store.get([f"key {seed}", f"key {10 * number + seed}"])
                failures.extend(key for key in got if not same(got[key], document(int(key[4:]))))
        except Exception as error:
            failures.append(error)

    with SoftTokenStore(folder, dtype="float32", memory_bytes=5000) as store:
        threads = [threading.Thread(target=work, args=(store, number)) for number in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert len(store) == 25
        assert store.verify() == []


def put_some(folder: Path, number: int) -> None:
    with SoftTokenStore(folder, dtype="float32") as store:
        for seed in range(8):
            store.put(documents(seed, 100 * number + seed), fingerprint=KIND)


def test_two_processes_make_and_fill_one_store(folder: Path) -> None:
    context = multiprocessing.get_context("spawn" if sys.version_info >= (3, 12) else "fork")
    workers = [context.Process(target=put_some, args=(folder, number)) for number in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    with SoftTokenStore(folder, readonly=True) as store:
        keys = [f"key {base + seed}" for base in (0, 100, 200) for seed in range(8)]
        got = store.get(keys)
        assert len(got) == len(store) == 24
        assert all(same(got[key], document(int(key[4:]))) for key in keys)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_store_goes_on_in_both_processes_after_a_fork(filled: Path) -> None:
    with SoftTokenStore(filled, dtype="float32", memory_bytes=0) as store:
        store.get(["key 1"])
        inherited = list(store._index._opened)
        # As if another thread had been reading at that moment.
        store._index._lock.acquire()
        store._memory._lock.acquire()
        child = os.fork()
        if not child:
            right = 1
            try:
                right = 0 if same(store.get(["key 2"])["key 2"], document(2)) else 2
                store.put(documents(5), fingerprint=KIND)
                right |= 4 * bool(set(store._index._opened) & set(inherited))
            finally:
                os._exit(right)
        store._index._lock.release()
        store._memory._lock.release()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        store.put(documents(6), fingerprint=KIND)
        assert len(store.get(["key 3", "key 5", "key 6"])) == 3


def test_a_writer_that_gets_no_turn_says_so(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.05)
    db = sqlite3.connect(filled / "store.sqlite", isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    with SoftTokenStore(filled) as store:
        with pytest.raises(StoreError, match=r"needs its lock, got none within 0.05 seconds.*try again"):
            store.put(documents(9), fingerprint=KIND)
        assert len(store.get(["key 1"])) == 1  # readers do not wait
        db.execute("ROLLBACK")
        store.put(documents(9), fingerprint=KIND)
    db.close()
    assert len(shards(filled)) == 3


# -------------------------------------------------------------------------------- refused on purpose


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype must be one of 'float32'"):
        SoftTokenStore(dtype="float64")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="memory_bytes must be >= 0, got -1"):
        SoftTokenStore(memory_bytes=-1)
    with pytest.raises(ConfigError, match="needs a folder"):
        SoftTokenStore(readonly=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"states_MD": torch.zeros(5, 8)}, r"document key must have states"),
        ({"states_MD": torch.zeros(6, 8, 1)}, r"got shapes \(6, 8, 1\)"),
        ({"states_MD": torch.zeros(6, 0)}, r"got shapes \(6, 0\)"),
        ({"ids_T": torch.zeros(10, dtype=torch.int32)}, r"as its chunks have tokens \(11\)"),
        ({"states_MD": torch.full((6, 8), float("nan"))}, "must be finite in float16"),
        ({"states_MD": torch.full((6, 8), 70000.0)}, "values beyond its range; use bfloat16"),
    ],
)
def test_documents_that_cannot_be_kept_are_refused(
    folder: Path, changed: dict[str, torch.Tensor], message: str
) -> None:
    one = document(1)
    parts = {name: getattr(one, name) for name in StoredDocument.__dataclass_fields__}
    with SoftTokenStore(folder, dtype="float16") as store:
        with pytest.raises(InputError, match=message):
            store.put({"good": one, "key": StoredDocument(**{**parts, **changed})}, fingerprint=KIND)
        assert len(store) == 0
        with pytest.raises(InputError, match=r"one size, got \[7, 8\]"):
            store.put({"good": one, "key": document(1, width=7)}, fingerprint=KIND)


def test_a_readonly_store_is_read_and_never_written(filled: Path) -> None:
    before = {path: path.read_bytes() for path in filled.rglob("*") if path.is_file()}
    with SoftTokenStore(filled, readonly=True) as store:
        assert len(store.get([f"key {seed}" for seed in range(1, 5)])) == 4
        assert store.verify() == []
        with pytest.raises(StoreError, match="readonly=True; open it without that"):
            store.put(documents(9), fingerprint=KIND)
        with pytest.raises(StoreError, match="readonly=True; open it without that"):
            store.gc()
    assert {path: path.read_bytes() for path in before} == before


def test_a_readonly_store_sees_what_a_writer_adds(filled: Path) -> None:
    with SoftTokenStore(filled, readonly=True) as reader, SoftTokenStore(filled) as writer:
        writer.put(documents(9), fingerprint=KIND)
        assert len(reader.get(["key 9"])) == 1


@pytest.fixture
def sealed(filled: Path) -> Iterator[Path]:
    """A store nobody may write to, in a place that other users can reach."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        shutil.copytree(filled, place / "store")
        for path in (place, *place.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield place / "store"
        for path in (place, place / "store", place / "store" / "shards"):
            path.chmod(0o755)


def unprivileged(check: Any, *arguments: Any) -> None:
    """Run a check in a process for which permissions count, even where the tests run as root."""
    child = os.fork()
    if not child:
        failed = 1
        try:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            check(*arguments)
            failed = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(failed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def read_sealed(folder: Path) -> None:
    with SoftTokenStore(folder, readonly=True) as store:
        got = store.get([f"key {seed}" for seed in range(1, 5)])
        assert all(same(got[f"key {seed}"], document(seed)) for seed in range(1, 5))
    with pytest.raises(StoreError, match=r"can write to, got: .*open it with readonly=True"):
        SoftTokenStore(folder)
    with pytest.raises(StoreError, match=r"can write to, got: .*open it with readonly=True"):
        SoftTokenStore(folder.parent / "new")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_folder_without_write_permission(sealed: Path) -> None:
    unprivileged(read_sealed, sealed)


def read_unlogged(folder: Path) -> None:
    with (
        pytest.warns(StoreWarning, match="newest entries .* may be absent"),
        SoftTokenStore(folder, readonly=True) as store,
    ):
        assert len(store.get([f"key {seed}" for seed in range(1, 5)])) == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_log_that_cannot_be_read_is_reported(sealed: Path) -> None:
    (sealed / "store.sqlite-wal").write_bytes(b"x" * 100)
    (sealed / "store.sqlite-wal").chmod(0o444)
    unprivileged(read_unlogged, sealed)


def test_places_that_are_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"got no store.sqlite there; check the path"):
        SoftTokenStore(tmp_path / "none", readonly=True)
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("text", encoding="utf-8")
    with pytest.raises(StoreError, match="must be a folder"):
        SoftTokenStore(tmp_path / "file")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "store.sqlite").write_bytes(b"no database, but long enough to be one " * 30)
    (tmp_path / "other").mkdir()
    execute(tmp_path / "other", "CREATE TABLE birds (name)")
    before = (tmp_path / "other" / "store.sqlite").read_bytes()
    for name in ("text", "other"):
        for readonly in (False, True):
            with pytest.raises(StoreError, match=r"store.sqlite in .* must be the index of a store, got: "):
                SoftTokenStore(tmp_path / name, readonly=readonly)
    assert (tmp_path / "other" / "store.sqlite").read_bytes() == before


@pytest.mark.parametrize("readonly", [False, True])
def test_another_format(filled: Path, readonly: bool) -> None:
    execute(filled, "UPDATE meta SET value = '2'")
    with pytest.raises(StoreError, match="has format 2, this version reads 1; update ctxcompress"):
        SoftTokenStore(filled, readonly=readonly)


def test_a_damaged_index(filled: Path) -> None:
    path = filled / "store.sqlite"
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(StoreError, match="must be the index of a store"):
        SoftTokenStore(filled).get(["key 1"])


def test_a_closed_store(filled: Path) -> None:
    store = SoftTokenStore(filled)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed; open it again"):
        store.get(["key 1"])


# ------------------------------------------------------------------------------------------ full disk


def test_a_full_index_keeps_nothing_of_the_call(filled: Path) -> None:
    with SoftTokenStore(filled, dtype="float32") as store:
        with store._index._database() as db:
            pages = db.execute("PRAGMA page_count").fetchone()[0]
            db.execute(f"PRAGMA max_page_count = {pages}")
        before = shards(filled)
        many = {f"{'k' * 100} {seed}": document(seed) for seed in range(100)}
        with pytest.raises(StoreError, match=r"database or disk is full.*check the disk's free space"):
            store.put(many, fingerprint=KIND)
        assert shards(filled) == before
        assert store.missing(list(many)) == list(many)
        assert len(store.get(["key 1", "key 4"])) == 2


# ------------------------------------------------------------------------------------------------ cli


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["store", *map(str, arguments)])


def test_ls(filled: Path) -> None:
    result = run("ls", filled, "--json")
    assert result.exit_code == 0, result.stderr
    listed = json.loads(result.stdout)
    assert {entry["key"] for entry in listed["entries"]} == {f"key {seed}" for seed in range(1, 5)}
    assert listed["compressors"][KIND] == {"entries": 2, "tokens": 22, "bytes": 520}
    shown = run("ls", filled)
    assert KIND in shown.stdout
    assert "520" in shown.stdout


def test_verify_ends_with_1_if_something_is_damaged(filled: Path) -> None:
    assert run("verify", filled).exit_code == 0
    home_of(filled, "key 1").unlink()
    with pytest.warns(StoreWarning):
        result = run("verify", filled, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"entries": 4, "damaged": ["key 1", "key 2"]}
    again = run("verify", filled)
    assert again.exit_code == 0
    assert "2 entries" in again.stdout


def test_gc_keeps_the_fingerprints_it_is_told(filled: Path) -> None:
    result = run("gc", filled, "--keep", "another", "--json")
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["removed"] == 2
    assert figures["bytes_after"] < figures["bytes_before"]
    shown = run("gc", filled)
    assert "0 entries removed" in shown.stdout
    with SoftTokenStore(filled) as store:
        assert sorted(entry.key for entry in store.entries()) == ["key 3", "key 4"]


@pytest.mark.parametrize("command", ["ls", "verify", "gc"])
def test_commands_make_no_store(tmp_path: Path, command: str) -> None:
    result = run(command, tmp_path / "none")
    assert result.exit_code == 1
    assert "check the path" in result.stderr
    assert not (tmp_path / "none").exists()
