"""Completions: texts and token ids continued."""

from __future__ import annotations

from serving import events, post


async def test_a_completion_continues_the_text(client, engine):
    answer = await post(client, "completions", model="tiny", prompt="once", max_tokens=5, logprobs=2)
    (choice,) = answer["choices"]
    assert answer["object"] == "text_completion"
    assert choice["text"] == engine.generate("once", raw=True, max_new_tokens=5).text
    assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"]) == 5
    assert choice["logprobs"]["text_offset"][:2] == [0, len(choice["logprobs"]["tokens"][0])]


async def test_several_prompts_have_a_choice_each(client, engine):
    answer = await post(client, "completions", prompt=["once", [70, 71]], max_tokens=4)
    expected = [engine.generate(one, raw=True, max_new_tokens=4).text for one in ("once", [70, 71])]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert answer["usage"]["completion_tokens"] == 8


async def test_a_completion_streams(client):
    whole = await post(client, "completions", prompt="once", max_tokens=5)
    chunks = await events(client, "completions", prompt="once", max_tokens=5)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
