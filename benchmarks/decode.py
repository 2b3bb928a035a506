"""How much time gating costs: one request at a time, against `generate()` and against the paper's published procedure.

Ratios only: every contender runs once a round, in turn, and what is printed is the median over rounds and prompts of
tokens/s relative to the baseline of the same round. Absolute speeds depend on the machine and on what else it does.

    python benchmarks/decode.py [--model smollm2] [--tokens 24] [--rounds 3] [--json out.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from mara_integrations.engine.backend import make_backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.head import MARAHead
from mara_integrations.engine.sequence import Request
from mara_integrations.messages import Message
from mara_integrations.models import LoadedModel, ModelSpec, load_model
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import random_head

PROMPTS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Explain the difference between a virus and a bacterium.",
)
ACCEPT_RATES = (0.95, 0.7, 0.4, 0.1, 0.0)


def generate(model: LoadedModel, prompt_ids: list[int], num_tokens: int) -> list[int]:
    """Greedy `generate()` of transformers."""
    out = model.model.generate(
        torch.tensor([prompt_ids], device=model.device),
        do_sample=False,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        pad_token_id=0,
    )
    return out[0, len(prompt_ids) :].tolist()


@torch.inference_mode()
def published(model: LoadedModel, head: MARAHead, prompt_ids: list[int], num_tokens: int) -> list[int]:
    """The paper's procedure on today's cache: candidates one by one, a whole forward for each."""
    warpers = LogitsProcessorList([TopKLogitsWarper(40), TopPLogitsWarper(0.95)])

    def forward(token_ids: list[int], cache: DynamicCache) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([token_ids], device=model.device)
        out = model.model(input_ids=ids, past_key_values=cache, use_cache=True, output_hidden_states=True)
        return out.logits[:, -1], out.hidden_states[-1][0, -1:]

    cache, reply = DynamicCache(config=model.model.config), []
    logits, state = forward(prompt_ids, cache)
    while len(reply) < num_tokens:
        scores = warpers(None, logits.float())
        order = scores[0].sort(descending=True)
        candidates = order.indices[order.values.isfinite()].tolist()
        first = taken = None
        for candidate in candidates:
            branch = copy.copy(cache)  # its tensors are replaced on update, not written to
            branch.layers = [copy.copy(layer) for layer in cache.layers]
            seen = forward([candidate], branch)
            first = first or (candidate, branch, seen)
            if len(candidates) == 1 or float(head.score(seen[1], state)[0]) > 0:
                taken = (candidate, branch, seen)
                break
        token_id, cache, (logits, state) = taken or first  # the published fallback
        reply.append(token_id)
    return reply


def typical_states(model: LoadedModel, prompts: list[list[int]]) -> torch.Tensor:
    """States of candidates of all ranks, to set a head's accept rate on."""
    untrained = MARAHead(random_head(model.hidden_size, "residual").config).to(model.device).eval()
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, seed=0)
    requests = [Request(ids, sampling, head=untrained, keep_positions=True) for ids in prompts]
    done = Decoder(make_backend(model.model)).run(requests)
    return torch.cat([position.states for sequence in done for position in sequence.positions]).float().cpu()


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Run and print; returns the medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=list(ACCEPT_RATES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    model = load_model(ModelSpec(args.model))
    prompts = [model.encoder.encode([Message("user", text)]) for text in PROMPTS]
    decoder = Decoder(make_backend(model.model))
    states = typical_states(model, prompts)

    def gated(head: MARAHead | None, prompt_ids: list[int]) -> list[int]:
        request = Request(prompt_ids, SamplingParams(max_new_tokens=args.tokens), head=head)
        return decoder.run([request])[0].token_ids

    table: dict[str, dict[str, float]] = {}
    for rate in args.rates:
        head = random_head(model.hidden_size, inner_sizes=(1024, 256), accept_rate=rate, states=states, seed=1)
        head = head.to(model.device)
        contenders: dict[str, Callable[[list[int]], list[int]]] = {
            "generate": lambda ids: generate(model, ids, args.tokens),
            "ungated": lambda ids: gated(None, ids),
            "published": lambda ids, head=head: published(model, head, ids, args.tokens),
            "gated": lambda ids, head=head: gated(head, ids),
        }
        ratios: dict[str, list[float]] = {"gated / generate": [], "gated / published": [], "ungated / generate": []}
        for _ in range(args.rounds):
            for ids in prompts:
                speed, replies = {}, {}
                for name, run in contenders.items():
                    start = time.perf_counter()
                    replies[name] = run(ids)
                    speed[name] = len(replies[name]) / (time.perf_counter() - start)
                assert replies["gated"] == replies["published"], "both are the same method"
                for ratio in ratios:
                    ours, theirs = ratio.split(" / ")
                    ratios[ratio].append(speed[ours] / speed[theirs])
        table[f"{rate:g}"] = {name: statistics.median(values) for name, values in ratios.items()}
        spread = {name: f"{min(values):.2f}-{max(values):.2f}" for name, values in ratios.items()}
        cells = "   ".join(f"{name} {table[f'{rate:g}'][name]:.2f} ({spread[name]})" for name in ratios)
        print(f"accept rate {rate:<5g} {cells}", flush=True)
    if args.json:
        about = {
            "model": model.name,
            "device": str(model.device),
            "machine": platform.processor() or platform.machine(),
        }
        args.json.write_text(json.dumps({"about": about, "medians": table}, indent=1) + "\n")
    return table


if __name__ == "__main__":
    main()
