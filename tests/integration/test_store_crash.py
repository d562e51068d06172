"""What a store keeps when writers are killed or the disk is full; this file is also the writers' program."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import torch

from ctxcompress.errors import StoreError
from ctxcompress.store import SoftTokenStore
from ctxcompress.stored import StoredChunk, StoredDocument

KILLS = 20


def document(number: int) -> StoredDocument:
    """Told by its number alone, so that any process can check it."""
    states_MD = torch.arange(number, number + 320, dtype=torch.float32).reshape(10, 32)
    ids_T = torch.arange(number, number + 20, dtype=torch.int32)
    counts_M = torch.full((10,), 2, dtype=torch.int32)
    return StoredDocument((StoredChunk((0, 90), 20, number / 7, 1.0),), ids_T, states_MD, counts_M, 2)


def right(found: dict[str, StoredDocument]) -> bool:
    return all(
        one.chunks == document(int(key)).chunks
        and torch.equal(one.states_MD, document(int(key)).states_MD)
        and torch.equal(one.ids_T, document(int(key)).ids_T)
        and torch.equal(one.counts_M, document(int(key)).counts_M)
        for key, one in found.items()
    )


# ----------------------------------------------------------------------------------- in other processes


def say(line: object) -> None:
    """In one piece, so that lines of two processes do not mix."""
    os.write(1, f"{line}\n".encode())


def write_until_killed(folder: Path, first: int) -> None:
    """Say each key after `put` has returned; merge shards now and then."""
    with SoftTokenStore(folder, dtype="float32") as store:
        for start in range(first, first + 10_000, 3):
            store.put({str(number): document(number) for number in range(start, start + 3)}, fingerprint="a")
            for number in range(start, start + 3):
                say(number)
            if (start - first) % 15 == 12:
                store.gc()


def write_files_no_longer_than(folder: Path, first: int, limit: int) -> None:
    """Say how far `put` comes when a longer file fails like a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        with SoftTokenStore(folder, dtype="float32") as store:
            store.put({str(number): document(number) for number in range(first, first + 50)}, fingerprint="a")
        say("kept")
    except StoreError as error:
        say(error)


def fill(folder: Path) -> None:
    """Put until the disk is full, then say the keys that were kept."""
    acknowledged: list[str] = []
    ballast = folder.with_name("ballast")
    ballast.write_bytes(b"x" * 50_000)
    with SoftTokenStore(folder, dtype="float32") as store:
        try:
            for start in range(10_000):
                some = {str(100 * start + step): document(100 * start + step) for step in range(20)}
                store.put(some, fingerprint=str(start % 3))
                acknowledged.extend(some)
        except StoreError as error:
            say(error)
        try:
            store.gc()  # merging needs space that is not there
            say("merged")
        except StoreError:
            say("not merged")
    with SoftTokenStore(folder, dtype="float32") as store:
        found = store.get(acknowledged)
        say(len(store) == len(found) == len(acknowledged) and right(found))
        say(len(list((folder / "shards").iterdir())) == len(acknowledged) // 20)
        ballast.unlink()
        say(store.gc(keep=["1"]).removed > 0)
        store.put({"7": document(7)}, fingerprint="a")
        say(store.verify() == [] and right(store.get(["7"])))


def serve() -> None:
    """Fork a process for each command on standard input: importing torch once is enough."""
    while command := sys.stdin.readline().split():
        child = os.fork()
        if not child:
            work = {"write": write_until_killed, "limit": write_files_no_longer_than}[command[0]]
            work(Path(command[1]), *map(int, command[2:]))
            os._exit(0)
        say(f"started {child}")
        os.waitpid(child, 0)
        say("ended")


# --------------------------------------------------------------------------------------------- the tests


class Workers:
    """The other process, told what to fork."""

    def __init__(self, commands: IO[str], lines: IO[str]) -> None:
        self._commands, self._lines = commands, lines

    def start(self, *command: object) -> tuple[int, list[str]]:
        """Process id, and what was said before it was known."""
        self._commands.write(" ".join(map(str, command)) + "\n")
        self._commands.flush()
        said = self._said("started")
        return int(said.pop().split()[1]), said

    def end(self) -> list[str]:
        """What was said until the process was gone."""
        return self._said("ended")[:-1]

    def _said(self, last: str) -> list[str]:
        lines = [self._lines.readline().strip()]
        while not lines[-1].startswith(last):
            assert lines[-1], "the workers' process has ended"
            lines.append(self._lines.readline().strip())
        return lines


SINGLE = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=SINGLE,
    ) as process:
        assert process.stdin
        assert process.stdout
        yield Workers(process.stdin, process.stdout)
        process.stdin.close()


def test_killed_writers_lose_nothing_they_acknowledged(workers: Workers, tmp_path: Path) -> None:
    folder, acknowledged, moments = tmp_path / "store", [], random.Random(1)
    for round_ in range(KILLS):
        child, said = workers.start("write", folder, 10_000 * round_)
        time.sleep(moments.uniform(0.0, 0.25))
        os.kill(child, signal.SIGKILL)
        acknowledged += [line for line in [*said, *workers.end()] if line.isdigit()]
        if not (folder / "store.sqlite").exists():
            continue
        # Warnings are errors: nothing is damaged either. Readers need no writer to clean up first.
        with SoftTokenStore(folder, memory_bytes=0, readonly=bool(round_ % 2 and acknowledged)) as store:
            found = store.get(acknowledged)
            assert len(found) == len(acknowledged)
            assert right(found)
            everything = [entry.key for entry in store.entries()]
            assert right(store.get(everything))
            assert len(store.get(everything)) == len(everything)
    assert len(acknowledged) > 5 * KILLS
    with SoftTokenStore(folder, memory_bytes=0) as store:
        count = len(store)
        store.gc()
        assert len(list((folder / "shards").iterdir())) == 1
        assert len(store) == count
        assert right(store.get(acknowledged))


def test_files_that_may_not_grow(workers: Workers, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with SoftTokenStore(folder, dtype="float32") as store:
        store.put({"1": document(1)}, fingerprint="a")
    outcomes = []
    # 50 documents are a shard of 75 kB and a log of some 30 kB.
    for number, limit in enumerate((100, 5_000, 20_000, 35_000, 50_000, 70_000, 400_000), 1):
        _, said = workers.start("limit", folder, 1000 * number, limit)
        (outcome,) = [*said, *workers.end()]  # it may be done before its start is told
        outcomes.append(outcome)
        with SoftTokenStore(folder, memory_bytes=0) as store:
            assert len(store) == (51 if outcome == "kept" else 1)
            assert len(list((folder / "shards").iterdir())) == (2 if outcome == "kept" else 1)
            assert right(store.get([entry.key for entry in store.entries()]))
    assert outcomes[-1] == "kept"
    assert all("check the disk's free space" in outcome for outcome in outcomes[:-1])


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_full_disk(tmp_path: Path) -> None:
    script = 'mount -t tmpfs -o size=600k none "$1" 2>/dev/null || exit 77; exec "$2" "$3" "$1/store"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path), sys.executable, __file__],
        capture_output=True,
        text=True,
        timeout=120,
        env=SINGLE,
        check=False,
    )
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip("no disk of its own can be mounted here")
    assert done.returncode == 0, done.stderr
    failure, *rest = done.stdout.splitlines()
    assert "check the disk's free space" in failure
    assert rest == ["not merged", "True", "True", "True", "True"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        fill(Path(sys.argv[1]))
    else:
        serve()
