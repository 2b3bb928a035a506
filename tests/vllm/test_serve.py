"""`vllm serve` with the plug-in: any OpenAI client names the head of its request."""

from __future__ import annotations

import pytest
from vllm_serving import TEXT, TOKENS, complete, expected, serving_vllm

from mara_integrations.errors import MaraError
from mara_integrations.remote.connection import Address
from mara_integrations.remote.engine import ServerEngine
from mara_integrations.testing import random_head

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def client(served, environment):
    pytest.importorskip("openai")
    with serving_vllm(served[0], "--middleware", "mara_integrations.vllm.http.MaraBody") as client:
        yield client


def test_a_client_names_its_head(client, served):
    head = served[2]["q0"]
    plain, gated = expected(served[1], None), expected(served[1], head)
    assert complete(client) == plain != gated
    assert complete(client, {"vllm_xargs": {"mara_head": "q0"}}) == gated
    assert complete(client, {"mara": {"head": "q0"}}) == gated
    assert complete(client, {"mara": {"head": "q0", "strength": 0.4}}) == expected(served[1], head, 0.4)
    assert complete(client, {"mara": {"head": "q0", "strength": 0}}) == plain


@pytest.mark.parametrize(
    ("mara", "said"),
    [
        ({"head": "absent"}, "no head 'absent' is served"),
        ({"head": "narrow"}, "head 'narrow' expects hidden size 48; model 'tiny' has 64"),
        ({"head": "afterstate"}, "can't run in vLLM"),
        ({"head": "q0", "strength": 2000.0}, "strength=2000.0 is not allowed"),
        ("q0", "is not allowed"),
    ],
)
def test_a_bad_request_has_status_400_and_hurts_nobody(client, served, mara, said):
    import openai

    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, {"mara": mara})
    assert said in str(refused.value)
    assert str(served[0]) not in str(refused.value)
    assert complete(client, {"mara": {"head": "q1"}}) == expected(served[1], served[2]["q1"])


def test_a_head_put_into_the_folder_is_served_and_replaced_without_a_restart(client, served):
    for seed in (30, 31):
        head = random_head(64, "q", seed=seed, top_k=8, scale=4.0)
        head.save_pretrained(served[0] / "heads" / "new")
        assert complete(client, {"mara": {"head": "new"}}) == expected(served[1], head)


def test_chats_and_streams_have_heads_too(client):
    def chat(**body):
        asked = {"model": "tiny", "messages": [{"role": "user", "content": TEXT}], "max_tokens": TOKENS}
        chunks = client.chat.completions.create(**asked, temperature=0.0, stream=True, extra_body=body)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    assert chat(mara={"head": "q0"}) == chat(vllm_xargs={"mara_head": "q0"}) != chat()


def test_our_engine_runs_its_heads_there(client):
    asked = {"model": "tiny", "prompt": TEXT, "max_tokens": TOKENS, "temperature": 0.0}
    want = client.completions.create(**asked, extra_body={"mara": {"head": "q0", "strength": 0.7}}).choices[0].text
    settings = {"max_new_tokens": TOKENS, "strength": 0.7}
    with ServerEngine(Address.of(str(client.base_url)), "tiny", "q0", **settings) as engine:
        assert engine.generate(TEXT, raw=True).text == want
        assert "".join(update.text for update in engine.stream(TEXT, raw=True)) == want
        assert engine.generate(TEXT, raw=True, head=None).text != want
        with pytest.raises(MaraError, match="no head 'absent' is served"):
            engine.generate(TEXT, raw=True, head="absent")
