"""Measure how much faster an engine on the CPU decodes if the calling thread ends its OpenMP threads.

An engine decodes in a thread of its own. Before each request the thread that asks has computed, as an application does
that embeds a question; then it releases its threads to the engine, as `MARAEngine` has it, or keeps them. In turns,
round by round, in one process.

    python benchmarks/threads.py [--model smollm2] [--engines transformers llama.cpp] [--requests 1 16] [--tokens 48]
        [--rounds 3] [--threads 2] [--json benchmarks/results/threads.json]
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from operator import eq
from typing import Any
from unittest.mock import patch

import torch
from measure import Ratios, add_options, seconds
from serve import QUESTIONS

from mara_integrations.engine import workers
from mara_integrations.models.openmp import WaitingThreads
from mara_integrations.runtime import MARAEngine

WAYS = ("released", "kept")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument("--engines", nargs="+", choices=("transformers", "llama.cpp"), default=["transformers"])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16])
    parser.set_defaults(threads=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    ratios = Ratios()
    for name in args.engines:
        threads = {"model_kwargs": {"n_threads": args.threads}} if name == "llama.cpp" else {}
        with MARAEngine(args.model, engine=name, device="cpu", **threads) as engine:
            for count in args.requests:
                row = f"{name}, {count} request{'s' if count > 1 else ''}"
                prompts = [QUESTIONS[number % len(QUESTIONS)] for number in range(count)]
                for number in range(-1, args.rounds):  # what is set up on first use is no part of what is timed
                    speed, tokens = {}, {}
                    for way in WAYS:
                        speed[way], tokens[way] = _answered(engine, prompts, args.tokens, way)
                    equal = sum(map(eq, tokens["released"], tokens["kept"])) / count
                    if number >= 0:
                        ratios.add(row, "released / kept", speed["released"] / speed["kept"])
                        for way in WAYS:
                            ratios.add(row, f"tokens/s, {way}", speed[way])
                        ratios.add(row, "share of equal replies", equal)
                ratios.show(row)
    ratios.write(args.json, args.model)
    return ratios.rows()


def _answered(engine: MARAEngine, prompts: list[str], num_tokens: int, way: str) -> tuple[float, list[list[int]]]:
    """Tokens/s of all replies together, and their tokens."""
    torch.ones(1 << 20).exp()  # on all threads
    with ExitStack() as as_before:
        if way == "kept":
            as_before.enter_context(patch.object(workers, "release_threads", lambda: None))
            as_before.enter_context(patch.object(WaitingThreads, "observe", lambda *_: None))
        taken_s, replies = seconds(lambda: engine.generate_batch(prompts, temperature=0.0, max_new_tokens=num_tokens))
    tokens = [list(reply.token_ids) for reply in replies]
    return sum(map(len, tokens)) / taken_s, tokens


if __name__ == "__main__":
    main()
