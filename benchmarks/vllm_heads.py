"""Compare vLLM with Q-heads to vLLM without, by ratios of tokens/s.

Requests are decoded together, greedily, and no reply ends early: without a head, all under one head, and each under a
head of its own. Every contender runs in every round, in turn; a ratio is of one round. The model is a folder, as
`save_pretrained` writes it; heads are random ones of the trainer's size.

    OMP_NUM_THREADS=1 python benchmarks/vllm_heads.py --model FOLDER [--tokens 24] [--rounds 4] [--json out.json]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

import torch
from measure import Ratios, add_options, seconds
from serve import QUESTIONS
from transformers import AutoConfig

from mara_integrations.testing import random_head

# In this process, where its CPU seconds are counted; the cores are the caller's business.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


def main(arguments: list[str] | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Run and print; returns the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 64], help="decoded at once")
    args = parser.parse_args(arguments)
    ratios = Ratios()
    with tempfile.TemporaryDirectory() as heads:
        width = AutoConfig.from_pretrained(args.model).hidden_size
        for i in range(max(args.requests)):
            random_head(width, "q", seed=i, inner_sizes=(256, 64)).save_pretrained(f"{heads}/{i}")
        os.environ.update({**SETTINGS, "MARA_HEADS": heads})
        measure(args, ratios)
    for row in ratios.rows():
        ratios.show(row)
    ratios.write(args.json, os.path.basename(os.path.normpath(args.model)))
    return ratios.rows()


def measure(args: argparse.Namespace, ratios: Ratios) -> None:
    """Time all contenders in every round."""
    from vllm import LLM, SamplingParams

    llm = LLM(args.model, dtype="float32", enforce_eager=True, max_model_len=512, enable_prefix_caching=False)
    if args.threads:
        torch.set_num_threads(args.threads)

    def answer(count: int, heads: list[str | None]) -> float:
        """Decode so many replies at once; how long it took."""
        length = {"temperature": 0.0, "max_tokens": args.tokens, "ignore_eos": True}
        asked = [SamplingParams(**length, extra_args=head and {"mara": {"head": head}}) for head in heads]
        prompts = (QUESTIONS * count)[:count]
        return seconds(lambda: llm.generate(prompts, asked, use_tqdm=False))[0]

    for count in args.requests:
        row = f"{count} request{'s' * (count > 1)}"
        contenders: dict[str, list[str | None]] = {"ungated": [None] * count, "one Q-head": ["0"] * count}
        if count > 1:
            contenders[f"{count} Q-heads"] = [str(i) for i in range(count)]
        for heads in contenders.values():
            answer(count, heads)  # tables of new heads
        for _ in range(args.rounds):
            taken = {name: answer(count, heads) for name, heads in contenders.items()}
            ratios.add(row, "one Q-head / ungated", taken["ungated"] / taken["one Q-head"])
            if count > 1:
                ratios.add(row, f"{count} Q-heads / one", taken["one Q-head"] / taken[f"{count} Q-heads"])


if __name__ == "__main__":
    main()
