"""A model in two processes, each with half of the vocabulary, gives the tokens of one that is whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from mara_integrations.engine.oracle.reference import generate_reference
from mara_integrations.sampling import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PROMPTS = [torch.randint(1, 256, (5,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(3)]
HEADS = ["q0", "wide", None]
SCRIPT = """
import json, sys

def main():
    from vllm import LLM, SamplingParams
    model, prompts, heads = json.loads(sys.argv[1])
    sizes = {"tensor_parallel_size": 2, "max_model_len": 256}
    llm = LLM(model, dtype="float32", enforce_eager=True, **sizes)
    length = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
    asked = [SamplingParams(**length, extra_args=head and {"mara": {"head": head}}) for head in heads]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    print("RESULT", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))

if __name__ == "__main__":
    main()
"""


def test_ranks_that_share_the_vocabulary_gate_alike(served, environment, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    given = json.dumps([str(served[0] / "tiny"), PROMPTS, HEADS])
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script), given], capture_output=True, text=True, env=env, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]

    sampling = SamplingParams(max_new_tokens=8, top_k=8)
    heads = [served[2].get(name) for name in HEADS]
    want = [generate_reference(served[1], ids, head, sampling) for ids, head in zip(PROMPTS, heads, strict=True)]
    assert json.loads(line.removeprefix("RESULT")) == want
