"""`SoftContextPrompt`: documents and a question become the messages decoders of soft tokens know."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.runnables import RunnableLambda
from langchain_ctxcompress import ChatCtxCompress, CtxCompressor, SoftContextPrompt

from ctxcompress import ContextCompressor, InputError, question_content

QUESTION = "Who discovered penicillin?"


@pytest.fixture
def soft(wide: ContextCompressor, documents: list[Document]) -> list[Document]:
    """The pages, compressed to soft tokens."""
    settings = CtxCompressor(compressor=wide, compression_ratio=3, mode="soft")
    return settings.compress_documents(documents, QUESTION)


def block(document: Document) -> dict[str, Any]:
    account = document.metadata["ctxcompress"]
    value = {"type": "ctxcompress", "ref": account["ref"], "num_tokens": account["tokens_after"]}
    return {"type": "non_standard", "value": value}


def asked(documents: Any, **settings: Any) -> Any:
    return SoftContextPrompt(**settings).invoke({"context": documents, "question": QUESTION})


def test_soft_documents_become_blocks_and_others_text(soft: list[Document]) -> None:
    plain = Document("Owls fly at night.")
    dropped = soft[1].model_copy(update={"metadata": {"ctxcompress": {"ref": "0" * 32, "tokens_after": 0}}})
    (message,) = asked([soft[0], plain, dropped, Document(""), soft[2]], order="original")
    before, after = question_content(QUESTION, [["\0"]])[0::2]
    assert message == HumanMessage(
        [
            {"type": "text", "text": before},
            block(soft[0]),
            {"type": "text", "text": "\n\nOwls fly at night.\n\n"},
            block(soft[2]),
            {"type": "text", "text": after},
        ]
    )
    assert [part["type"] for part in message.content_blocks] == [
        "text", "non_standard", "text", "non_standard", "text",
    ]  # fmt: skip


@pytest.mark.parametrize("order", ["score", "edges", "original"])
def test_the_prompt_is_that_of_the_library(
    wide: ContextCompressor, llm: ChatCtxCompress, recording: Any, soft: list[Document], order: Any
) -> None:
    texts = [document.page_content for document in soft]
    result = wide.compress(texts, QUESTION, compression_ratio=3, mode="soft")
    answer = wide.answer(result, max_new_tokens=12, order=order)
    reply = llm.invoke(asked(soft, order=order))
    assert reply.text == answer.text
    assert reply.usage_metadata["input_tokens"] == answer.prompt_tokens
    # The very tensors: equal parts have one reference, and the first that was issued is kept or its equal.
    (prompt,) = recording.prompts
    for part, expected in zip(
        prompt, wide.prompt([("user", question_content(QUESTION, result.parts(order)))]), strict=True
    ):
        assert part == expected or (part.embeddings_MD == expected.embeddings_MD).all()


def test_documents_that_are_all_text_make_a_message_for_any_model(documents: list[Document]) -> None:
    (message,) = asked(documents, order="original")
    texts = [[document.page_content] for document in documents]
    assert message == HumanMessage("".join(question_content(QUESTION, texts)))
    assert asked([]) == asked([Document("")]) == [HumanMessage("".join(question_content(QUESTION)))]


def test_shares_order_documents(documents: list[Document]) -> None:
    pages = [
        document.model_copy(update={"metadata": {"ctxcompress": {"share": share}}})
        for document, share in zip(documents, [0.5, 0.3, 0.2], strict=True)
    ]
    (message,) = asked(pages)
    places = [message.content.index(document.page_content) for document in pages]
    assert places == sorted(places, reverse=True)


async def test_system_history_and_other_keys(documents: list[Document]) -> None:
    prompt = SoftContextPrompt(system="Be brief.", context_key="pages", question_key="q", history_key="past")
    given = {"pages": documents, "q": QUESTION, "past": [("human", "Hi."), AIMessage("Hello.")], "other": 1}
    messages = prompt.invoke(given)
    assert messages[:3] == [SystemMessage("Be brief."), HumanMessage("Hi."), AIMessage("Hello.")]
    assert messages[3:] == asked(documents)
    assert await prompt.ainvoke(given) == messages
    assert prompt.batch([given, given]) == [messages, messages]
    del given["past"]
    assert (RunnableLambda(lambda x: x) | prompt).invoke(given) == [messages[0], messages[3]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"context": []}, r"keys 'context' and 'question', got \['context'\]"),
        ([], "keys 'context' and 'question', got list"),
        ({"context": "text", "question": QUESTION}, "must be a list of documents, got str"),
        ({"context": ["text"], "question": QUESTION}, "must be a list of documents, got list"),
        ({"context": [], "question": ["Who?"]}, "question must be a string, got list"),
    ],
)
def test_what_is_no_question_about_documents_is_refused(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SoftContextPrompt().invoke(given)


@pytest.mark.parametrize("account", [None, "text", 7, [], {}])
def test_metadata_that_is_not_ours_is_let_be(account: Any) -> None:
    (message,) = asked([Document("Owls fly.", metadata={"ctxcompress": account})])
    assert "Owls fly." in message.content
