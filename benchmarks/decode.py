"""How much time gating costs: one request at a time, against `generate()` and against the paper's published procedure.

Ratios only: every contender runs once a round, in turn, and what is printed is the median over rounds and prompts of
tokens/s relative to the baseline of the same round, prompts read included. Absolute speeds depend on the machine and on
what else it does. Tokens are compared: ungated with `generate()`, gated with the published procedure.

    python benchmarks/decode.py [--model smollm2] [--tokens 24] [--rounds 3] [--threads 1] [--json out.json]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import Ratios, add_options, peak_bytes, seconds

from mara_integrations.engine.backend import make_backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.head import MARAHead
from mara_integrations.engine.published import generate_published
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
_NOTICE = (
    "The library of Harrow Lane opens at nine in the morning and closes at six in the evening. Members borrow up to "
    "eight books for three weeks. A late book costs ten pence a day, and a lost one its price."
)
COPY_PROMPTS = (
    f"Repeat this text word for word: {_NOTICE}",
    f"{_NOTICE} Write the notice above once more, without any change.",
    f"Correct the spelling in this text, and keep everything else: {_NOTICE.replace('evening', 'evning')}",
)
ACCEPT_RATES = (0.95, 0.7, 0.4, 0.1, 0.0)


def generate(model: LoadedModel, prompt_ids: list[int], num_tokens: int, **settings: Any) -> list[int]:
    """Greedy `generate()` of transformers."""
    out = model.model.generate(
        torch.tensor([prompt_ids], device=model.device),
        do_sample=False,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        pad_token_id=0,
        **settings,
    )
    return out[0, len(prompt_ids) :].tolist()


def typical_states(model: LoadedModel, prompts: list[list[int]]) -> torch.Tensor:
    """States of candidates of all ranks, to set a head's accept rate on."""
    untrained = MARAHead(random_head(model.hidden_size, "residual").config).to(model.device).eval()
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, seed=0)
    requests = [Request(ids, sampling, head=untrained, keep_positions=True) for ids in prompts]
    done = Decoder(make_backend(model.model)).run(requests)
    return torch.cat([position.states for sequence in done for position in sequence.positions]).float().cpu()


def main(arguments: list[str] | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Run and print; returns the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument("--rates", type=float, nargs="+", default=list(ACCEPT_RATES))
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    model = load_model(ModelSpec(args.model))
    loaded_bytes = peak_bytes()
    backend = make_backend(model.model)
    print(f"{type(backend).__name__}, {torch.get_num_threads()} threads, tokens/s relative to each other", flush=True)
    prompts, copies = (
        [model.encoder.encode([Message("user", text)]) for text in texts] for texts in (PROMPTS, COPY_PROMPTS)
    )
    states = typical_states(model, prompts)
    ratios = Ratios()

    def compare(row: str, ids: list[int], contenders: dict[str, Callable[[], list[int]]], pairs: list[str]) -> None:
        speed, replies = {}, {}
        for name, run in contenders.items():
            taken_s, replies[name] = seconds(run)
            speed[name] = len(replies[name]) / taken_s
        for one, other in (("gated", "published"), ("ungated", "generate")):
            if one in replies and other in replies:
                assert replies[one] == replies[other], f"{one} and {other} are the same method"
        for pair in pairs:
            ours, theirs = pair.split(" / ")
            ratios.add(row, pair, speed[ours] / speed[theirs])

    for rate in args.rates:
        head = random_head(model.hidden_size, inner_sizes=(1024, 256), accept_rate=rate, states=states, seed=1)
        head = head.to(model.device)
        num_tokens = args.tokens if rate >= 0.4 else max(1, args.tokens // 2)  # the published procedure takes long
        decoder = Decoder.measured(backend)  # learns the accept rate
        ours = _gated(decoder, num_tokens)
        for _ in range(args.rounds):
            for ids in prompts:
                contenders = {
                    "generate": lambda ids=ids, n=num_tokens: generate(model, ids, n),
                    "gated": lambda ids=ids, head=head, ours=ours: ours(head, ids),
                    "published": lambda ids=ids, head=head, n=num_tokens: generate_published(model.model, head, ids, n),
                }
                compare(f"accept {rate:g}", ids, contenders, ["gated / generate", "gated / published"])
        ratios.show(f"accept {rate:g}")
    head = random_head(model.hidden_size, inner_sizes=(1024, 256), accept_rate=0.95, states=states, seed=1)
    ours, num_tokens = _gated(Decoder.measured(backend), args.tokens), args.tokens
    for row, texts in (("ungated", prompts), ("copies, accept 0.95", copies)):
        for _ in range(args.rounds):
            for ids in texts:
                contenders = {
                    "generate": lambda ids=ids: generate(model, ids, num_tokens),
                    "ungated": lambda ids=ids: ours(None, ids),
                    "prompt lookup": lambda ids=ids: generate(model, ids, num_tokens, prompt_lookup_num_tokens=8),
                }
                pairs = ["ungated / generate", "prompt lookup / generate"]
                if texts is copies:
                    contenders["gated"] = lambda ids=ids: ours(head, ids)
                    pairs = ["gated / generate", *pairs]
                compare(row, ids, contenders, pairs)
        ratios.show(row)
    print(f"memory at its peak: model {loaded_bytes >> 20} MiB, decoding {peak_bytes() >> 20} MiB")
    ratios.write(args.json, model.name)
    return ratios.rows()


def _gated(decoder: Decoder, num_tokens: int) -> Callable[[MARAHead | None, list[int]], list[int]]:
    def run(head: MARAHead | None, prompt_ids: list[int]) -> list[int]:
        decoder.prefixes.clear()  # the others read the prompt each time, too
        return decoder.run([Request(prompt_ids, SamplingParams(max_new_tokens=num_tokens), head=head)])[0].token_ids

    return run


if __name__ == "__main__":
    main()
