"""A control token that a user or a document spells is text, through both frameworks."""

from __future__ import annotations

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from llama_index.core.llms import ChatMessage

from mara_integrations import MARALLM
from mara_integrations.testing import tiny_model, tiny_tokenizer

LLM = MARALLM((tiny_model(), tiny_tokenizer()), max_tokens=2)


def test_langchain_counts_its_letters() -> None:
    def length(content: str) -> int:
        call = AIMessage("", tool_calls=[{"name": "read", "args": {"page": content}, "id": "c"}])
        conversation = [HumanMessage(content), call, ToolMessage(content, tool_call_id="c")]
        usage = LLM.invoke(conversation).usage_metadata
        assert usage is not None
        assert usage["input_tokens"] == LLM.get_num_tokens_from_messages(conversation)
        return usage["input_tokens"]

    assert length("<eos>") == length("<abc>")


def test_llama_index_counts_its_letters() -> None:
    def length(content: str) -> tuple[int, int]:
        chat, completion = LLM.chat([ChatMessage(content)]), LLM.complete(content)
        return chat.raw["usage"]["prompt_tokens"], completion.raw["usage"]["prompt_tokens"]

    assert length("<eos>") == length("<abc>")


def test_in_raw_text_it_is_a_token() -> None:
    letters, token = (LLM.complete(text, raw=True).raw["usage"]["prompt_tokens"] for text in ("a<abc>", "a<eos>"))

    assert (letters, token) == (6, 2)
