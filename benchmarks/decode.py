"""How much time gating costs: one request at a time, against `generate()` and against the paper's published procedure.

Ratios only: every contender runs once a round, in turn, and what is printed is the median over rounds and prompts of
tokens/s relative to the baseline of the same round: of whole replies, and of what comes after their first token, where
the prompt takes no part. Absolute speeds depend on the machine and on what else it does. How far gating can beat the
published procedure depends on the candidates that this one visits one by one: they are counted beside the ratios.
Tokens are compared: ungated with `generate()`, gated with the published procedure.

    python benchmarks/decode.py [--model smollm2] [--tokens 48] [--rounds 3] [--threads 1] [--json out.json]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from measure import Ratios, add_options, peak_bytes, timed

from mara_integrations.engine.backend import make_backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.head import MARAHead
from mara_integrations.engine.published import generate_published
from mara_integrations.engine.sequence import Request, Sequence
from mara_integrations.engine.verification import verify
from mara_integrations.messages import Message
from mara_integrations.models import LoadedModel, ModelSpec, load_model
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import random_head

PROMPTS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Explain the difference between a virus and a bacterium.",
    "Give me three reasons to learn a second language.",
    "How do I keep a houseplant alive through the winter?",
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
Run: TypeAlias = Callable[[int], list[int]]  # from a number of tokens to the reply
ACCEPT_RATES = (0.95, 0.7, 0.4, 0.1, 0.0)


def generate(model: LoadedModel, prompt_ids: list[int], num_tokens: int, **settings: Any) -> list[int]:
    """Greedy `generate()` of transformers, to the end of the reply or of its tokens."""
    ids = torch.tensor([prompt_ids], device=model.device)
    out = model.model.generate(ids, do_sample=False, max_new_tokens=num_tokens, pad_token_id=0, **settings)
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

    def compare(row: str, request: Request, contenders: dict[str, Run], pairs: list[str]) -> None:
        times = {name: timed(run, request.sampling.max_new_tokens) for name, run in contenders.items()}
        for one, other in (("gated", "published"), ("ungated", "generate")):
            if one in times and other in times and times[one].reply != times[other].reply:
                verification = verify(model.model, request, times[one].reply)
                assert verification.holds, f"{one} and {other} are the same method: {verification}"
        for pair in pairs:
            ours, theirs = (times[name] for name in pair.split(" / "))
            ratios.add(row, pair, ours.speed / theirs.speed)
            ratios.add(row, f"{pair}, after the first token", ours.decoding_speed / theirs.decoding_speed)

    for rate in args.rates:
        head = random_head(model.hidden_size, inner_sizes=(1024, 256), accept_rate=rate, states=states, seed=1)
        head = head.to(model.device)
        num_tokens = args.tokens if rate >= 0.4 else max(2, args.tokens // 2)  # the published procedure takes long
        decoder = Decoder.measured(backend)  # learns the accept rate
        row = f"accept {rate:g}"
        for _ in range(args.rounds):
            for ids in prompts:
                request = Request(ids, SamplingParams(max_new_tokens=num_tokens, seed=0), head=head)
                contenders: dict[str, Run] = {
                    "generate": lambda n, ids=ids: generate(model, ids, n),
                    "gated": lambda n, request=request, decoder=decoder: decode(decoder, request, n).token_ids,
                    "published": lambda n, ids=ids, head=head: generate_published(model.model, head, ids, n),
                }
                compare(row, request, contenders, ["gated / generate", "gated / published"])
                stats = decode(decoder, request, num_tokens).stats
                asked, unasked = stats.accepted + stats.rejected, stats.single
                ratios.add(row, "published: forwards a token", (asked + unasked) / num_tokens)
                ratios.add(row, "candidates accepted", stats.accepted / max(1, asked))
        ratios.show(row)
    head = random_head(model.hidden_size, inner_sizes=(1024, 256), accept_rate=0.95, states=states, seed=1)
    head, decoder = head.to(model.device), Decoder.measured(backend)
    for row, texts in (("ungated", prompts), ("copies, accept 0.95", copies)):
        for _ in range(args.rounds):
            for ids in texts:
                sampling = SamplingParams(max_new_tokens=args.tokens, seed=0)
                gated = Request(ids, sampling, head=head, eos_token_ids=model.eos_token_ids)
                base = replace(gated, head=None)
                contenders = {
                    "generate": lambda n, ids=ids: generate(model, ids, n),
                    "ungated": lambda n, base=base: decode(decoder, base, n).token_ids,
                    "prompt lookup": lambda n, ids=ids: generate(model, ids, n, prompt_lookup_num_tokens=8),
                }
                pairs = ["ungated / generate", "prompt lookup / generate"]
                if texts is copies:
                    contenders["gated"] = lambda n, gated=gated: decode(decoder, gated, n).token_ids
                    pairs = ["gated / generate", *pairs]
                compare(row, base, contenders, pairs)
        ratios.show(row)
    print(f"memory at its peak: model {loaded_bytes >> 20} MiB, decoding {peak_bytes() >> 20} MiB")
    ratios.write(args.json, model.name)
    return ratios.rows()


def decode(decoder: Decoder, request: Request, num_tokens: int) -> Sequence:
    """Up to this many tokens of the reply, its prompt read from the start as by the others."""
    decoder.prefixes.clear()
    return decoder.run([replace(request, sampling=request.sampling.updated(max_new_tokens=num_tokens))])[0]


if __name__ == "__main__":
    main()
