"""What serving many requests gains: 16 at once against one at a time and against padded `generate()`; kept prefixes.

Ratios only, medians over rounds in which every contender runs in turn.

    python benchmarks/serve.py [--model smollm2] [--tokens 24] [--rounds 3] [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from decode import typical_states

from mara_integrations.engine.backend import make_backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.head import MARAHead
from mara_integrations.engine.sequence import Request
from mara_integrations.messages import Message
from mara_integrations.models import ModelSpec, load_model
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import random_head

TOPICS = ("rain", "bread", "bicycles", "owls", "tides", "chess", "violins", "maps")
NUM_REQUESTS, SHARED_WORDS = 16, 700


def seconds(run: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run and print; returns the medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.95, 0.7])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    model = load_model(ModelSpec(args.model))
    backend = make_backend(model.model)
    questions = [f"Tell me {how} about {topic}." for topic in TOPICS for how in ("something new", "a short story")]
    prompts = [model.encoder.encode([Message("user", question)]) for question in questions[:NUM_REQUESTS]]
    states = typical_states(model, prompts[:3])
    ratios: dict[str, list[float]] = {}

    def together(head: MARAHead | None) -> list[list[int]]:
        decoder = Decoder(backend)
        sampling = SamplingParams(max_new_tokens=args.tokens)
        return [s.token_ids for s in decoder.run([Request(ids, sampling, head=head) for ids in prompts])]

    def one_by_one(head: MARAHead | None) -> list[list[int]]:
        sampling = SamplingParams(max_new_tokens=args.tokens)
        return [Decoder(backend).run([Request(ids, sampling, head=head)])[0].token_ids for ids in prompts]

    def padded() -> None:
        batch = model.tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side="left").to(model.device)
        length = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens}
        model.model.generate(**batch, do_sample=False, pad_token_id=0, **length)

    for rate in args.rates:
        head = random_head(model.hidden_size, inner_sizes=(1024, 256), accept_rate=rate, states=states, seed=1)
        head = head.to(model.device)
        assert together(head) == one_by_one(head), "a batch gives the tokens of its requests alone"
        for _ in range(args.rounds):
            batch, alone, plain = (
                seconds(lambda h=head: together(h)),
                seconds(lambda h=head: one_by_one(h)),
                seconds(padded),
            )
            ratios.setdefault(f"16 at once / one at a time, accept {rate:g}", []).append(alone / batch)
            ratios.setdefault(f"16 at once / padded generate(), accept {rate:g}", []).append(plain / batch)

    system = " ".join(f"Rule {i}: be brief." for i in range(SHARED_WORDS // 4))
    decoder, one = Decoder(backend), SamplingParams(max_new_tokens=1)
    for number in range(args.rounds):
        conversations = ([Message("system", system), Message("user", f"{number}{which}?")] for which in "ab")
        first, second = (Request(model.encoder.encode(conversation), one) for conversation in conversations)
        decoder.prefixes.clear()
        cold, warm = seconds(lambda r=first: decoder.run([r])), seconds(lambda r=second: decoder.run([r]))
        name = f"time to first token, {len(first.prompt_ids)} tokens, all but the question kept"
        ratios.setdefault(name, []).append(cold / warm)

    medians = {name: statistics.median(values) for name, values in ratios.items()}
    for name, values in ratios.items():
        print(f"{name:<72} {medians[name]:6.2f} ({min(values):.2f}-{max(values):.2f})")
    if args.json:
        args.json.write_text(json.dumps({"model": model.name, "medians": medians}, indent=1) + "\n")
    return medians


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
