"""References: unguessable names for what is left of documents, and placeholders in text."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctxcompress import ContextCompressor, InputError, SoftTokens, SoftTokenStore, placeholder
from ctxcompress.references import References


def soft(rows: int, value: float = 1.0, fingerprint: str = "decoder") -> SoftTokens:
    return SoftTokens(torch.full((rows, 4), value), rows * 8, 8, fingerprint)


def refused(references: References, reference: Any) -> str:
    with pytest.raises(InputError) as caught:
        references.resolve(reference)
    return str(caught.value)


def test_what_was_issued_resolves_to_itself() -> None:
    references, one, two = References(), soft(2), soft(3)
    first, second = references.issue(["Rome.", one]), references.issue([two])
    assert first != second
    assert re.fullmatch("[0-9a-f]{32}", first)
    text, found = references.resolve(first)
    assert (text, found is one) == ("Rome.", True)
    assert references.resolve(second)[0] is two
    assert references.resolve(references.issue([])) == ()


def test_equal_parts_have_equal_references_and_others_have_not() -> None:
    references = References()
    parts: list[list[str | SoftTokens]] = [
        ["ab", "c"],
        ["a", "bc"],
        ["abc"],
        [soft(2)],
        [soft(2, 1.5)],
        [soft(2, fingerprint="other")],
        [soft(1), soft(1)],
        [],
        [""],
    ]
    issued = [references.issue(own) for own in parts]
    assert len(set(issued)) == len(parts) == len(references)
    assert [references.issue(own) for own in parts] == issued
    assert len(references) == len(parts)


def test_no_two_tables_issue_the_same_or_see_each_other() -> None:
    one, two = References(), References()
    reference = one.issue(["Rome."])
    assert two.issue(["Rome."]) != reference
    assert refused(two, reference)


def test_what_is_unknown_gets_one_answer_whatever_it_is() -> None:
    references = References()
    expired = references.issue(["Rome."])
    references.clear()
    foreign = References().issue(["Rome."])
    forged: list[Any] = [expired, foreign, "0" * 32, "", "../../etc/passwd", None, 7, ["a"], "\ud800"]
    assert len({refused(references, reference) for reference in forged}) == 1


def test_the_least_recently_used_expire() -> None:
    references = References(memory_bytes=3 * 600)
    first, second, third = (references.issue([name * 20]) for name in "abc")
    references.resolve(first)
    fourth = references.issue(["d" * 20])
    assert refused(references, second)
    assert [references.resolve(kept)[0] for kept in (first, third, fourth)] == ["a" * 20, "c" * 20, "d" * 20]


def test_what_does_not_fit_is_refused_and_nothing_is_lost() -> None:
    references = References(memory_bytes=1000)
    kept = references.issue(["Rome."])
    with pytest.raises(InputError, match=r"must fit 1,000 bytes, got"):
        references.issue(["x" * 1000])
    assert references.resolve(kept) == ("Rome.",)


def test_placeholders_expand_in_their_places() -> None:
    references, own = References(), soft(2)
    rome, owls = references.issue(["Rome", own]), references.issue(["Owls"])
    text = f"Context:\n{placeholder(rome)}\n\n{placeholder(owls)}{placeholder(rome)} Who?"
    assert references.expand(text) == ["Context:\n", "Rome", own, "\n\n", "Owls", "Rome", own, " Who?"]


def test_what_a_placeholder_stands_for_is_not_searched_again() -> None:
    references = References()
    secret = references.issue(["secret"])
    sneaky = references.issue([placeholder(secret)])
    assert references.expand(placeholder(sneaky)) == [placeholder(secret)]


@given(st.text(alphabet="[]ctx:0123456789abcdef \n", max_size=80) | st.text(max_size=40))
def test_text_without_our_references_stays_as_it_is(text: str) -> None:
    references = References()
    references.issue(["Rome."])
    assert references.expand(text) == ([text] if text else [])
    forged = placeholder("0" * 32) + text
    assert references.expand(forged) == [forged]


def test_threads_share_a_table() -> None:
    references = References(memory_bytes=600 * 40)
    with ThreadPoolExecutor(8) as pool:
        issued = list(pool.map(lambda place: references.issue([f"{place % 20:020d}"]), range(400)))
    assert len(set(issued)) == len(references) == 20
    assert references.resolve(issued[-1]) == (f"{399 % 20:020d}",)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_fork_keeps_them_even_if_the_lock_was_held() -> None:
    store = SoftTokenStore()
    reference = store.references.issue(["Rome."])
    store.references._lock.acquire()
    child = os.fork()
    if not child:
        os._exit(0 if store.references.resolve(reference) == ("Rome.",) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_they_expire_with_their_store(soft_compressor: ContextCompressor) -> None:
    result = soft_compressor.compress(
        ["Rome is in Italy."] * 2, compression_ratio=4, mode="soft", allocator="uniform"
    )
    references = soft_compressor.references
    assert references is soft_compressor.store.references
    reference = references.issue(result.documents[0].parts)
    assert list(references.resolve(reference)) == result.documents[0].parts
    soft_compressor.store.close()
    assert refused(references, reference)
