"""`ServerEngine` on servers that are not ours: vLLM with and without the plug-in, gateways, and what breaks."""

from __future__ import annotations

import json
import time

import pytest
from serving import serving
from vllm_like import TEXT, THOUGHTS, VLLMLike

from mara_integrations.errors import ConfigError, ContextLengthError, HeadError, ServerError
from mara_integrations.messages import Message, Tool
from mara_integrations.replies.forms import ReplyForm

ARGUMENTS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}
TOOL = Tool("add", "Add numbers.", ARGUMENTS)


@pytest.fixture
def engine(make, vllm):
    return make(model="m", url=vllm.url)


def test_a_head_travels_as_arguments_of_the_plug_in(engine, vllm):
    assert engine.generate("hi", head="brand", strength=0.5, top_k=7, seed=3, stop=["x"]).text == TEXT

    body = vllm.bodies[-1]
    asked = {"mara_head": ["brand"], "mara_weights": [1.0], "mara_strength": 0.5, "mara_top_k": 7}
    assert body["vllm_xargs"] == asked
    assert body["messages"] == [{"role": "user", "content": "hi"}]
    assert (body["temperature"], body["max_tokens"], body["seed"], body["stop"]) == (0, 512, 3, ["x"])
    assert not {"head", "strength", "top_k"} & body.keys()
    engine.generate("hi", head={"brand": 0.5, "calm": 2})
    assert vllm.bodies[-1]["vllm_xargs"] == {"mara_head": ["brand", "calm"], "mara_weights": [0.5, 2]}


def test_without_a_head_nothing_of_ours_is_sent(engine, vllm):
    engine.generate("hi", strength=0.5, top_k=7, top_p=0.5)
    engine.generate([Message("user", "hi")], system_prompt="Be brief.")

    plain, prompted = vllm.bodies
    assert not {"vllm_xargs", "head", "strength"} & plain.keys() and (plain["top_k"], plain["top_p"]) == (7, 0.5)
    assert prompted["messages"][0] == {"role": "system", "content": "Be brief."}


def test_a_head_that_the_server_has_not_is_named(engine):
    with pytest.raises(HeadError, match=r"no head 'other' is served \(hint: heads are brand"):
        engine.generate("hi", head="other")


def test_ray_serve_runs_vllm_and_takes_heads_as_it_does(make):
    ray = VLLMLike(owner="organization-owner")
    with serving(ray.app) as port:
        make(model="m", url=f"http://127.0.0.1:{port}").generate("hi", head="brand")
    assert ray.bodies[-1]["vllm_xargs"] == {"mara_head": ["brand"], "mara_weights": [1.0]}


@pytest.mark.parametrize("owner", ["vllm", "organization-owner"])
def test_a_server_that_would_ignore_the_head_is_refused(make, owner):
    plain = VLLMLike(owner, has_plug_in=False)
    with serving(plain.app) as port:
        engine = make(model="m", url=f"http://127.0.0.1:{port}")
        with pytest.raises(ConfigError, match="has no plug-in for heads"):
            engine.generate("hi", head="brand")
        assert not plain.bodies and engine.generate("hi").text == TEXT


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"never": ["fox"]}, r"never=\['fox'\] is nothing that vLLM takes"),
        ({"min_candidates": 2}, "min_candidates is for heads"),
        ({"head": "brand", "selection": "first"}, "selection='first'"),
    ],
    ids=["never", "min_candidates", "selection"],
)
def test_what_vllm_lacks_is_refused_before_a_reply_is_asked_for(engine, vllm, settings, message):
    with pytest.raises(ConfigError, match=message):
        engine.generate("hi", **settings)
    assert not vllm.bodies


@pytest.mark.parametrize("owner", ["openai", None])
def test_other_servers_have_no_heads(make, owner):
    other = VLLMLike(owner=owner)
    with serving(other.app) as port:
        engine = make(model="m", url=f"http://127.0.0.1:{port}")
        assert engine.generate("hi").text == TEXT
        with pytest.raises(ConfigError, match="head='brand' is nothing that"):
            engine.generate("hi", head="brand")
        if owner is None:
            with pytest.raises(ServerError, match="status 404"):
                make(model=None, url=f"http://127.0.0.1:{port}").generate("hi")


def test_usage_name_and_window_are_the_servers(engine, vllm):
    reply = engine.generate("hi")

    assert (reply.prompt_tokens, reply.completion_tokens, reply.model_name) == (7, 5, "m")
    assert engine.report(reply) == {"model_name": "m", "finish_reason": "stop"}
    assert engine.outline.context_window == 2048
    assert engine.generate("once", raw=True).text == TEXT.replace(" ", "")
    assert vllm.bodies[-1]["prompt"] == "once"


# --- reading


def read(engine, **settings):
    """The pieces and the calls of a reply, streamed and whole, which have to agree."""
    updates = list(engine.stream("hi", **settings))
    whole = engine.generate("hi", **settings)
    assert [call.parsed for call in whole.calls] == [call.parsed for call in updates[-1].calls]
    assert (whole.text, whole.thoughts) == (updates[-1].generation.text, updates[-1].generation.thoughts)
    return [piece for update in updates for piece in update.pieces], whole.calls


@pytest.mark.parametrize("repeats_names", [False, True])
def test_calls_come_in_parts_of_any_size(engine, vllm, repeats_names):
    vllm.repeats_names = repeats_names
    pieces, (call,) = read(engine, form=ReplyForm((TOOL,), "add"))

    assert (call.name, call.id, call.error) == ("add", "chatcmpl-tool-1", None)
    assert call.parsed == {"a": 3, "b": "你好 こんにちは"}
    first, *more = [piece.call for piece in pieces if piece.call]
    assert first.name == "add" and not first.arguments
    assert json.loads("".join(part.arguments for part in more)) == call.parsed
    body = vllm.bodies[-1]
    assert body["tool_choice"] == {"type": "function", "function": {"name": "add"}}
    assert body["parallel_tool_calls"] is False and body["tools"] == [TOOL.as_dict()]


def test_thoughts_are_no_text(engine, vllm):
    vllm.thinks = True
    pieces, _ = read(engine)

    assert "".join(piece.thoughts for piece in pieces) == THOUGHTS.replace(" ", "")
    assert "".join(piece.text for piece in pieces) == TEXT == engine.generate("hi").text


def test_log_probabilities_are_those_that_came(engine, vllm):
    reply = engine.generate("hi", **engine.log_prob_settings(2))
    content = engine.report(reply, top_logprobs=2)["logprobs"]["content"]

    assert [token["token"].strip() for token in content] == TEXT.split(" ")
    assert all(token["logprob"] == -0.5 and len(token["top_logprobs"]) == 2 for token in content)
    assert vllm.bodies[-1]["logprobs"] is True


# --- what breaks


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("dies", r"the connection to .* failed|can't be read"),
        ("error", "status 500: engine dead"),
        ("ends", "before the reply was finished"),
        ("not json", "can't be read"),
    ],
)
def test_a_server_that_breaks_off_is_an_error_and_nobody_hangs(engine, vllm, fault, message):
    vllm.fault = fault
    with pytest.raises(ServerError, match=message):
        engine.generate("hi")
    heard = []
    with pytest.raises(ServerError, match=message):
        heard += [update.text for update in engine.stream("hi")]
    vllm.fault = None

    assert engine.generate("hi").text == TEXT


def test_a_server_that_falls_silent_is_an_error(make, vllm):
    vllm.fault = "hangs"
    began = time.monotonic()
    with pytest.raises(ServerError, match="did not answer in time"):
        make(model="m", url=vllm.url, timeout=0.5).generate("hi")
    assert time.monotonic() - began < 20


def test_a_cancelled_request_ends_while_the_server_is_silent(engine, vllm):
    vllm.fault = "hangs"
    stream = engine.stream("hi")
    next(stream)
    stream.close()

    end = time.monotonic() + 20
    while vllm.num_open:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("status", [429, 503])
def test_an_overloaded_server_is_asked_again(make, vllm, status):
    vllm.refusals = [status] * 2
    assert make(model="m", url=vllm.url, max_retries=2).generate("hi").text == TEXT

    vllm.refusals = [status] * 2
    with pytest.raises(ServerError, match=rf"status {status}: it is too much \(hint: .*max_retries"):
        make(model="m", url=vllm.url, max_retries=1).generate("hi")


def test_a_fault_of_the_server_is_told_with_its_status(engine, vllm):
    vllm.refusals = [500]
    with pytest.raises(ServerError, match="status 500: it is too much"):
        engine.generate("hi")


def test_a_prompt_that_is_too_long_is_a_context_length_error(engine):
    with pytest.raises(ContextLengthError, match="2048 tokens"):
        engine.generate("word " * 5000)
