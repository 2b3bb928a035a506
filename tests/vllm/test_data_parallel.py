"""`vllm serve --data-parallel-size 2`: copies of the model share the requests, and all of them have the heads."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from urllib.request import urlopen

import pytest
from vllm_serving import complete, expected, serving_vllm

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def client(served, environment):
    pytest.importorskip("openai")
    with serving_vllm(served[0], "--data-parallel-size", "2") as client:
        yield client


def metrics(client):
    with urlopen(f"http://{client.base_url.netloc.decode()}/metrics", timeout=60) as page:
        return page.read().decode()


def test_each_request_has_its_head_whichever_copy_answers(client, served):
    _, model, heads = served
    names = [*heads, None] * 4
    bodies = [name and {"vllm_xargs": {"mara_head": name}} for name in names]
    with ThreadPoolExecutor(len(bodies)) as pool:
        replies = list(pool.map(lambda body: complete(client, body), bodies))

    want = {name: expected(model, heads.get(name)) for name in {*names}}
    assert replies == [want[name] for name in names]
    written = re.findall(r'vllm:generation_tokens_total{engine="(\d)"[^}]*} (\d+)', metrics(client))
    assert {engine for engine, count in written if int(count)} == {"0", "1"}


def test_the_front_end_knows_the_model_of_its_copies(client):
    import openai

    with pytest.raises(openai.BadRequestError, match="head 'narrow' expects hidden size 48; model 'tiny' has 64"):
        complete(client, {"vllm_xargs": {"mara_head": "narrow"}})
