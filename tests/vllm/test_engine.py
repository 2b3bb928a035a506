"""`engine="vllm"`: vLLM in this process answers as our engine on transformers does."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from mara_integrations.errors import ConfigError, ContextLengthError, EngineClosedError
from mara_integrations.messages import Message, Tool
from mara_integrations.replies.forms import ReplyForm
from mara_integrations.runtime import MARAEngine
from mara_integrations.testing import random_head

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of vLLM and what it imports
    pytest.mark.timeout(900),  # vLLM starts in 20 s on an idle machine
]
KWARGS = {"max_model_len": 512, "kv_cache_memory_bytes": 1 << 28}
PROMPT = "Tell me a joke."
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["pun", "riddle"]}, "rating": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["kind", "rating"],
    "additionalProperties": False,
}
WEATHER = Tool("weather", "The weather of a city", {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}})


@pytest.fixture(scope="module")
def engine(served, environment):
    with MARAEngine(str(served[0] / "tiny"), engine="vllm", model_kwargs=KWARGS, max_new_tokens=12, top_k=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def ours(served):
    return MARAEngine(str(served[0] / "tiny"), engine="transformers", max_new_tokens=12, top_k=8)


@pytest.fixture(scope="module")
def heads(served):
    own = served[2]
    held = random_head(own["q0"].config.hidden_size, "q", seed=0, top_k=8, scale=4.0, greedy_top_p=0.3)
    both = {own["q1"]: 0.5, own["wide"]: 1.0}
    return {"base": None, "q": own["q0"], "held back": held, "wide": own["wide"], "both": both}


@pytest.mark.parametrize("name", ["base", "q", "held back", "wide", "both"])
def test_greedy_replies_are_those_on_transformers(engine, ours, heads, name):
    got, want = (one.generate(PROMPT, head=heads[name]) for one in (engine, ours))
    assert (got.token_ids, got.text, got.finish_reason) == (want.token_ids, want.text, want.finish_reason)
    assert got.log_probs == pytest.approx(want.log_probs, abs=1e-3)
    assert name == "base" or got.token_ids != ours.generate(PROMPT).token_ids, "the head changes something"
    assert name == "q" or got.token_ids != ours.generate(PROMPT, head=heads["q"]).token_ids


def test_strength_0_is_vllm_alone(engine, heads):
    plain = engine.generate(PROMPT).token_ids
    assert engine.generate(PROMPT, head=heads["q"], strength=0).token_ids == plain


def test_a_head_in_a_folder_is_named_by_its_path(engine, served, heads):
    named = engine.generate(PROMPT, head=served[0] / "heads" / "q0")
    assert named.token_ids == engine.generate(PROMPT, head=heads["q"]).token_ids


def test_requests_that_are_decoded_together_have_heads_of_their_own(engine, heads):
    alone = [engine.generate(PROMPT, head=head).token_ids for head in heads.values()]

    async def together():
        return await asyncio.gather(*[engine.agenerate(PROMPT, head=head) for head in heads.values()])

    assert [reply.token_ids for reply in asyncio.run(together())] == alone
    prompts = ["hi", "hello there", "good day"]
    batch = engine.generate_batch(prompts, head=heads["q"])
    assert [one.token_ids for one in batch] == [engine.generate(one, head=heads["q"]).token_ids for one in prompts]


def test_updates_add_up_to_the_reply(engine, heads):
    updates = list(engine.stream(PROMPT, head=heads["q"]))
    assert len(updates) > 2
    assert "".join(update.text for update in updates) == updates[-1].generation.text
    assert sum((update.token_ids for update in updates), ()) == updates[-1].generation.token_ids


def test_a_stream_that_is_dropped_leaves_room_for_others(engine):
    stream = engine.stream(PROMPT, max_new_tokens=200)
    next(stream)
    stream.close()
    deadline = time.monotonic() + 60
    while engine.status.num_live and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engine.status.num_live == 0
    assert len(engine.generate(PROMPT).token_ids) == 12


def test_a_stop_string_ends_the_reply(engine, ours):
    text = engine.generate(PROMPT).text
    stop = text[4:6]
    got, want = (one.generate(PROMPT, stop=[stop]) for one in (engine, ours))
    assert (got.text, got.finish_reason) == (want.text, "stop")
    assert stop not in got.text


def test_a_seed_repeats_a_reply_and_none_draws_anew(engine, heads):
    def drawn(seed):
        return engine.generate(PROMPT, head=heads["q"], strength=0.2, temperature=1.0, seed=seed).token_ids

    assert drawn(1) == drawn(1) != drawn(2)
    assert len({drawn(None) for _ in range(4)}) > 1


def test_samples_without_a_head_stay_among_the_candidates(engine, ours):
    first = ours.generate(PROMPT, max_new_tokens=1, trace=True, temperature=1.0, top_k=2).trace[0]
    drawn = {
        engine.generate(PROMPT, max_new_tokens=1, temperature=1.0, top_k=2, seed=seed).token_ids[0]
        for seed in range(20)
    }
    assert drawn == set(first.token_ids)


def test_log_probabilities_are_those_of_the_base_model(engine, ours, heads):
    settings = {"head": heads["q"], "max_new_tokens": 4}
    reply = engine.generate(PROMPT, **settings, **engine.log_prob_settings(3))
    told = engine.report(reply, top_logprobs=3)
    want = ours.generate(PROMPT, **settings)
    assert [token["logprob"] for token in told["logprobs"]["content"]] == pytest.approx(want.log_probs, abs=1e-3)
    tops = [[top["logprob"] for top in token["top_logprobs"]] for token in told["logprobs"]["content"]]
    assert all(len(top) == 3 and top == sorted(top, reverse=True) for top in tops)
    assert "gate" not in told and "trace" not in told


def test_a_schema_holds_and_the_head_chooses_within_it(engine, heads):
    form = ReplyForm(json_schema=SCHEMA)
    for head in heads.values():
        answer = json.loads(engine.generate(PROMPT, head=head, form=form, max_new_tokens=100).text)
        assert answer["kind"] in ("pun", "riddle") and 1 <= answer["rating"] <= 5


def test_a_tool_is_called(engine, heads):
    form = ReplyForm(tools=(WEATHER,), tool_choice="any")
    reply = engine.generate([Message("user", "hi")], head=heads["q"], form=form, max_new_tokens=150)
    [call] = reply.calls
    assert call.name == "weather" and set(call.parsed) <= {"city"}


def test_a_schema_that_can_not_be_compiled_is_refused_alone(engine):
    with pytest.raises(ConfigError):
        engine.generate(PROMPT, form=ReplyForm(json_schema={"type": "no such type"}))
    assert engine.generate(PROMPT).text


def test_what_vllm_can_not_do_is_refused_by_name(engine, served):
    for said, settings in {
        "'residual' form": {"head": served[0] / "heads" / "afterstate"},
        "trace=True": {"trace": True},
        "never": {"never": "refund"},
        "min_candidates=2": {"min_candidates": 2, "temperature": 1.0},
    }.items():
        with pytest.raises(ConfigError, match=said):
            engine.generate(PROMPT, **settings)
    with pytest.raises(ContextLengthError, match="raise max_model_len"):
        engine.generate("a" * 600)
    with pytest.raises(ConfigError, match="engine='transformers'"):
        engine.verify(PROMPT)


def test_an_argument_that_vllm_does_not_have_is_refused_with_the_nearest(served, environment):
    with pytest.raises(ConfigError, match="did you mean max_model_len"):
        MARAEngine(str(served[0] / "tiny"), engine="vllm", model_kwargs={"max_model_length": 9}).load()
    with pytest.raises(ConfigError, match="device='cuda:7'"):
        MARAEngine(str(served[0] / "tiny"), engine="vllm", device="cuda:7").load()


def test_the_model_is_the_one_that_transformers_loads(engine, ours):
    assert engine.model.fingerprint == ours.model.fingerprint
    assert engine.model.number_format == "float32"


def test_frameworks_run_it(served, environment, engine, ours, heads):
    pytest.importorskip("llama_index.core")
    from mara_integrations import MARALLM, ChatMARA

    settings = {"engine": "vllm", "model_kwargs": KWARGS, "max_tokens": 12, "top_k": 8, "head": heads["q"]}
    want = ours.generate(PROMPT, head=heads["q"]).text
    chat = ChatMARA(model=str(served[0] / "tiny"), **settings)
    assert chat.invoke(PROMPT).content == want
    assert "".join(chunk.content for chunk in chat.stream(PROMPT)) == want
    told = chat.invoke(PROMPT, top_logprobs=2).response_metadata["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in told] == [2] * 12
    llm = MARALLM(str(served[0] / "tiny"), **settings)
    assert llm.complete(PROMPT).text == want
    assert asyncio.run(llm.ainvoke(PROMPT)).content == want


def test_the_command_line_runs_it(served, environment, engine, heads, tmp_path):
    from typer.testing import CliRunner

    from mara_integrations.cli import app

    settings = {"engine": "vllm", "model": str(served[0] / "tiny"), "model-kwargs": KWARGS, "max-new-tokens": 12}
    settings |= {"head": str(served[0] / "heads" / "q0"), "top-k": 8}
    (tmp_path / "settings.yaml").write_text(json.dumps(settings))  # which is YAML, too
    said = CliRunner().invoke(app, ["generate", PROMPT, "--json", "--config", str(tmp_path / "settings.yaml")])
    assert said.exit_code == 0, said.output
    assert tuple(json.loads(said.stdout)["token_ids"]) == engine.generate(PROMPT, head=heads["q"]).token_ids


def test_a_closed_engine_takes_nothing_and_another_can_follow(served, environment, ours):
    settings = {"engine": "vllm", "model_kwargs": {**KWARGS, "max_model_len": 128}, "max_new_tokens": 12}
    first = MARAEngine(str(served[0] / "tiny"), **settings).load()
    first.close()
    with pytest.raises(EngineClosedError):
        first.generate(PROMPT)
    with MARAEngine(str(served[0] / "tiny"), **settings) as second:
        assert second.generate(PROMPT).token_ids == ours.generate(PROMPT).token_ids
