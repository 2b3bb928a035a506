"""Ray Serve's LLM deployment, started by the code in cookbook/vllm.md, runs the heads that its requests name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from vllm_serving import TEXT, TOKENS, client_of, complete, expected, free_port

from mara_integrations.errors import HeadError
from mara_integrations.remote.connection import Address
from mara_integrations.remote.engine import ServerEngine

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1200)]
COOKBOOK = (Path(__file__).parents[2] / "cookbook" / "vllm.md").read_text()
[CODE] = [code for code in re.findall(r"```python\n(.*?)```", COOKBOOK, re.DOTALL) if "ray.serve.llm" in code]


@pytest.fixture(scope="module")
def client(served, environment):
    pytest.importorskip("openai")
    for name in ("ray.serve", "ray.serve.llm"):
        pytest.importorskip(name, reason="needs ray[serve]", exc_type=ImportError)
    import ray
    from ray import serve

    root, *_ = served
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:  # for Ray's processes; the code names the heads
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("MARA_HEADS")
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            code = CODE.replace("/shared/heads", str(root / "heads")).replace("my-model", "tiny")
            exec(compile(code, "vllm.md", "exec"), {"MODEL": str(root / "tiny")})
            yield client_of(port)
        finally:
            serve.shutdown()
            ray.shutdown()


def test_a_client_names_its_head(client, served):
    _, model, heads = served
    plain, gated = expected(model, None), expected(model, heads["q0"])
    assert complete(client) == plain != gated
    assert complete(client, {"vllm_xargs": {"mara_head": "q0"}}) == gated
    weaker = {"mara_head": "q0", "mara_strength": 0.4}
    assert complete(client, {"vllm_xargs": weaker}) == expected(model, heads["q0"], 0.4)
    assert complete(client, {"vllm_xargs": {"mara_head": "wide"}}) == expected(model, heads["wide"])
    assert complete(client, {"mara": {"head": "q0"}}) == plain, "Ray Serve answers HTTP without the middleware"


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("absent", "no head 'absent' is served"),
        ("narrow", "head 'narrow' expects hidden size 48; model 'tiny' has 64"),
    ],
)
def test_a_bad_request_has_status_400_and_hurts_nobody(client, served, head, said):
    import openai

    with pytest.raises(openai.BadRequestError, match=said):
        complete(client, {"vllm_xargs": {"mara_head": head}})
    assert complete(client, {"vllm_xargs": {"mara_head": "q1"}}) == expected(served[1], served[2]["q1"])


def test_our_engine_runs_its_heads_there(client):
    asked = {"model": "tiny", "prompt": TEXT, "max_tokens": TOKENS, "temperature": 0.0}
    want = client.completions.create(**asked, extra_body={"vllm_xargs": {"mara_head": "q0"}}).choices[0].text
    with ServerEngine(Address.of(str(client.base_url)), "tiny", "q0", max_new_tokens=TOKENS) as engine:
        assert engine.generate(TEXT, raw=True).text == want
        assert engine.generate(TEXT, raw=True, head=None).text != want
        with pytest.raises(HeadError, match="no head 'absent' is served"):
            engine.generate(TEXT, raw=True, head="absent")
