"""What a `ChatMARA` message carries beside its text: log-probabilities and thoughts."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import pytest
import torch

from mara_integrations import ChatMARA
from mara_integrations.errors import ConfigError
from mara_integrations.frameworks.langchain import as_conversation
from mara_integrations.messages import Message

total = partial(reduce, operator.add)  # of the chunks of a stream


# --- log-probabilities


def test_log_probs_come_in_the_form_of_openai_with_what_the_gate_did(llm: ChatMARA) -> None:
    message = llm.invoke("hi", logprobs=True, top_logprobs=3)
    report = message.response_metadata

    assert "trace" not in report
    trace = llm.invoke("hi", trace=True).response_metadata["trace"]
    assert len(report["logprobs"]["content"]) == len(report["token_ids"]) == 12
    for token, token_id, seen in zip(report["logprobs"]["content"], report["token_ids"], trace, strict=True):
        taken = seen["candidates"][seen["taken"]]
        assert taken["token_id"] == token_id
        assert token["logprob"] == pytest.approx(taken["log_prob"], abs=1e-4)
        assert token["accept_logit"] == pytest.approx(taken["accept_logit"], abs=1e-4)
        assert token["outcome"] == seen["outcome"]
        assert [top["token"] for top in token["top_logprobs"]] == [each["token"] for each in seen["candidates"][:3]]
        assert set(token["top_logprobs"][0]) == {"token", "bytes", "logprob"}
    assert b"".join(bytes(token["bytes"]) for token in report["logprobs"]["content"]).decode(errors="replace")
    json.dumps(report)


def test_log_probs_are_the_models_own(llm: ChatMARA) -> None:
    message = llm.bind(logprobs=True, head=None).invoke("hi", max_tokens=3)
    prompt_ids = llm.engine.encode([Message("user", "hi")])
    token_ids = message.response_metadata["token_ids"]

    logits = llm.model[0](torch.tensor([[*prompt_ids, *token_ids]])).logits[0, len(prompt_ids) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]
    content = message.response_metadata["logprobs"]["content"]
    assert [token["logprob"] for token in content] == pytest.approx(expected.tolist(), abs=1e-4)
    assert content[0]["top_logprobs"] == [] and content[0]["accept_logit"] is None and content[0]["outcome"] == "base"


def test_log_probs_come_once_in_a_stream(llm: ChatMARA) -> None:
    chunks = list(llm.stream("hi", top_logprobs=2))

    assert ["logprobs" in chunk.response_metadata for chunk in chunks].count(True) == 1
    expected = llm.invoke("hi", top_logprobs=2).response_metadata["logprobs"]["content"]
    content = total(chunks).response_metadata["logprobs"]["content"]
    assert [token["token"] for token in content] == [token["token"] for token in expected]
    assert "logprobs" not in llm.invoke("hi", logprobs=False).response_metadata


@pytest.mark.parametrize("wish", [{"logprobs": "yes"}, {"top_logprobs": -1}, {"logprobs": True, "top_logprobs": 2.5}])
def test_a_wrong_wish_for_log_probs_is_refused(llm: ChatMARA, wish: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="logprobs="):
        llm.invoke("hi", **wish)


def test_parts_of_a_character_have_their_bytes(says: Callable[..., ChatMARA]) -> None:
    content = says("é").invoke("hi", logprobs=True).response_metadata["logprobs"]["content"]

    assert [token["bytes"] for token in content[:2]] == [[0xC3], [0xA9]]


# --- reasoning


@pytest.mark.parametrize("version", [None, "v1"])
def test_thoughts_become_reasoning_blocks(says: Callable[..., ChatMARA], version: Any) -> None:
    model = says("<think>\nA cat?\n</think>\n\nYes.", output_version=version)

    for message in (model.invoke("hi"), total(model.stream("hi"))):
        assert message.text == "Yes."
        blocks = [{name: block[name] for name in (block["type"], "type")} for block in message.content_blocks]
        assert blocks == [{"type": "reasoning", "reasoning": "A cat?"}, {"type": "text", "text": "Yes."}]
    assert message.additional_kwargs == {"reasoning_content": "A cat?"}


async def test_thoughts_are_streamed_as_they_are_written(says: Callable[..., ChatMARA]) -> None:
    chunks = [chunk async for chunk in says("<think>A cat?</think>Yes.").astream("hi")]

    thoughts = [chunk.additional_kwargs.get("reasoning_content", "") for chunk in chunks]
    assert "".join(thoughts) == "A cat?" and thoughts.count("") < len(thoughts) - 4
    assert "".join(chunk.text for chunk in chunks) == "Yes."


def test_a_template_may_begin_the_thoughts(says: Callable[..., ChatMARA], monkeypatch: pytest.MonkeyPatch) -> None:
    model = says("<think>\nA cat?</think>Yes.")
    tokenizer = model.engine.model.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", f"{tokenizer.chat_template}<think>\n")

    message = model.invoke("hi")  # the script goes on where the prompt ends

    assert message.text == "Yes."
    assert message.additional_kwargs == {"reasoning_content": "A cat?"}


def test_thoughts_of_the_past_are_not_shown_to_the_model_again(says: Callable[..., ChatMARA]) -> None:
    message = says("<think>A cat?</think>Yes.").invoke("hi")

    assert as_conversation([message]) == [Message("assistant", "Yes.")]
