"""What serving many requests gains: 16 at once against one at a time and against padded `generate()`; kept prefixes.

Ratios only, medians over rounds in which every contender runs in turn. Tokens of a batch are compared with those of its
requests alone.

    python benchmarks/serve.py [--model smollm2] [--tokens 24] [--rounds 3] [--threads 1] [--json out.json]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from decode import typical_states
from measure import Ratios, add_options, peak_bytes, seconds

from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.request import Request
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Message
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import random_head

TOPICS = ("rain", "bread", "bicycles", "owls", "tides", "chess", "violins", "maps")
QUESTIONS = tuple(f"Tell me {how} about {topic}." for topic in TOPICS for how in ("something new", "a short story"))
NUM_RULES = 104  # of a system prompt of about 800 tokens


def main(arguments: list[str] | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Run and print; returns the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, len(QUESTIONS)])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.95, 0.7])
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    model = load_model(ModelSpec(args.model))
    backend = make_backend(model.model)
    prompts = [model.encoder.encode([Message("user", question)]) for question in QUESTIONS]
    states = typical_states(backend, model.hidden_size, prompts[:3])
    ratios = Ratios()

    decoder = Decoder.measured(backend)

    def together(head: MARAHead | None, batch: list[list[int]]) -> list[list[int]]:
        decoder.prefixes.clear()
        sampling = SamplingParams(max_new_tokens=args.tokens)
        return [s.token_ids for s in decoder.run([Request(ids, sampling, head=head) for ids in batch])]

    def padded(batch: list[list[int]]) -> None:
        inputs = model.tokenizer.pad({"input_ids": batch}, return_tensors="pt", padding_side="left").to(model.device)
        length = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens}
        model.model.generate(**inputs, do_sample=False, pad_token_id=0, **length)

    for rate in args.rates:
        head = random_head(model.hidden_size, inner_sizes=(1024, 256), accept_rate=rate, states=states, seed=1)
        head = head.to(model.device)
        for size in args.batches:
            batch, row = prompts[:size], f"{size} requests, accept {rate:g}"
            for _ in range(args.rounds):
                together_s, replies = seconds(lambda h=head, b=batch: together(h, b))
                alone_s, alone = seconds(lambda h=head, b=batch: [together(h, [ids])[0] for ids in b])
                padded_s, _ = seconds(lambda b=batch: padded(b))
                assert replies == alone, "a batch gives the tokens of its requests alone"
                ratios.add(row, "at once / one at a time", alone_s / together_s)
                ratios.add(row, "at once / padded generate()", padded_s / together_s)
            ratios.show(row)

    system = " ".join(f"Rule {i}: be brief." for i in range(NUM_RULES))
    one = SamplingParams(max_new_tokens=1)
    for number in range(args.rounds):
        conversations = ([Message("system", system), Message("user", f"{number}{which}?")] for which in "ab")
        first, second = (Request(model.encoder.encode(conversation), one) for conversation in conversations)
        decoder.prefixes.clear()
        cold_s, _ = seconds(lambda r=first: decoder.run([r]))
        warm_s, _ = seconds(lambda r=second: decoder.run([r]))
        ratios.add(f"first of {len(first.prompt_ids)} tokens", "all but the question kept / not", cold_s / warm_s)
    ratios.show(f"first of {len(first.prompt_ids)} tokens")
    print(f"memory at its peak: {peak_bytes() >> 20} MiB")
    ratios.write(args.json, model.name)
    return ratios.rows()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
