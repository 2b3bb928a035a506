"""What many heads cost: 1, 16 and 256 different heads among requests decoded 16 at once, against one head for all.

The heads are copies of one, so that the work and the tokens are the same and what differs is the heads alone. Ratios of
tokens/s to those of the run with one head just before; the median over rounds, and their range.

    python benchmarks/heads.py [--model smollm2] [--tokens 12] [--rounds 5] [--json out.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from decode import PROMPTS, typical_states

from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.head_stacks import HeadInput, HeadStacks
from mara_integrations.engine.request import Request
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Message
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import random_head

BATCH, NUM_HEADS = 16, (1, 16, 256)


def run(
    decoder: Decoder, prompts: list[list[int]], heads: list[MARAHead], first: int, num_tokens: int
) -> tuple[float, list[list[int]]]:
    """Tokens/s and replies, request i under head `first + i`, as if more requests had come before."""
    sampling = SamplingParams(max_new_tokens=num_tokens)
    requests = [Request(ids, sampling, head=heads[(first + i) % len(heads)]) for i, ids in enumerate(prompts)]
    start = time.perf_counter()
    replies = [sequence.token_ids for sequence in decoder.run(requests)]
    return sum(map(len, replies)) / (time.perf_counter() - start), replies


def evaluation_ms(heads: list[MARAHead]) -> float:
    """Milliseconds to score one candidate for each of a full batch, under these heads in turn; median of 30."""
    stacks, states = HeadStacks(), torch.randn(BATCH, 1, heads[0].config.hidden_size, device=heads[0].ln.weight.device)
    shown = [HeadInput(heads[i % len(heads)], state, state[0]) for i, state in enumerate(states)]
    times = []
    for _ in range(30):
        start = time.perf_counter()
        stacks.score(shown)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run and print; returns the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", type=float, default=0.95, help="accept rate of the heads")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    model = load_model(ModelSpec(args.model))
    backend = make_backend(model.model)
    prompts = [model.encoder.encode([Message("user", text)]) for text in PROMPTS]
    head = random_head(
        model.hidden_size,
        inner_sizes=(1024, 256),
        accept_rate=args.rate,
        states=typical_states(backend, model.hidden_size, prompts),
        seed=1,
    ).to(model.device)
    heads = [copy.deepcopy(head) for _ in range(max(NUM_HEADS))]
    prompts = [prompts[i % len(prompts)] for i in range(args.requests)]

    decoder = Decoder(backend)
    decoder.scheduler.max_live = BATCH
    run(decoder, prompts, heads, 0, args.tokens)  # prompts are read and kept, kernels of all widths are made
    print(f"{args.requests} requests, {BATCH} at once, accept rate {args.rate:g}; tokens/s against one head for all")
    table: dict[str, dict[str, Any]] = {}
    for count in NUM_HEADS:
        ratios = []
        for number in range(args.rounds):
            base, want = run(decoder, prompts, [head], 0, args.tokens)
            speed, got = run(decoder, prompts, heads[:count], number * args.requests, args.tokens)
            assert got == want, "equal heads give equal tokens, stacked or not"
            ratios.append(speed / base)
        median, low, high = statistics.median(ratios), min(ratios), max(ratios)
        cost_ms, mb = evaluation_ms(heads[:count]), count * head.num_bytes / 1e6
        table[f"{count} heads"] = {"ratio": median, "range": [low, high], "evaluation_ms": cost_ms, "mb": mb}
        print(
            f"{count:>4} heads  {median:.2f} ({low:.2f}-{high:.2f})  {cost_ms:5.1f} ms a full batch  {mb:4.0f} MB",
            flush=True,
        )
    if args.json:
        about = {
            "model": model.name,
            "device": str(model.device),
            "machine": platform.processor() or platform.machine(),
        }
        args.json.write_text(json.dumps({"about": about, "heads": table}, indent=1) + "\n")
    return table


if __name__ == "__main__":
    main()
