"""How much time gating costs: one request at a time, against `generate()` and against the paper's published procedure.

Ratios only: every contender runs once a round, in turn, and what is printed is the median over rounds and prompts of
tokens/s relative to the baseline of the same round: of whole replies, and of what comes after their first token, where
the prompt takes no part. Absolute speeds depend on the machine and on what else it does. How far gating can beat the
published procedure depends on the candidates that this one visits one by one: they are counted beside the ratios.
Tokens are compared: ungated with `generate()`, gated with the published procedure.

    python benchmarks/decode.py [--model smollm2] [--tokens 48] [--rounds 3] [--threads 1] [--json out.json]

`--rates` and `--parts` name less; in an existing json, only the rows that were measured are replaced.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from measure import Ratios, add_options, peak_bytes, seconds, timed
from published_decoding import generate_published

from mara_integrations.engine.backends.protocol import Backend
from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.oracle.verify import verify
from mara_integrations.engine.request import Request
from mara_integrations.engine.sequence import Sequence
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Message
from mara_integrations.models.load import LoadedModel, ModelSpec, load_model
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
_PARTS = ("rates", "copies", "profile")
ACCEPT_RATES = (0.95, 0.7, 0.4, 0.1, 0.0)


def generate(model: LoadedModel, prompt_ids: list[int], num_tokens: int, **settings: Any) -> list[int]:
    """Greedy `generate()` of transformers, to the end of the reply or of its tokens."""
    ids = torch.tensor([prompt_ids], device=model.device)
    out = model.model.generate(ids, do_sample=False, max_new_tokens=num_tokens, pad_token_id=0, **settings)
    return out[0, len(prompt_ids) :].tolist()


def typical_states(backend: Backend, hidden_size: int, prompts: list[list[int]]) -> torch.Tensor:
    """States of candidates of all ranks, to set a head's accept rate on."""
    untrained = MARAHead(random_head(hidden_size, "residual").config).to(backend.device).eval()
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, seed=0)
    requests = [Request(ids, sampling, head=untrained, keep_positions=True) for ids in prompts]
    done = Decoder(backend).run(requests)
    return torch.cat([position.states for sequence in done for position in sequence.positions]).float().cpu()


class Ours:
    """Our loop on one request, as long as it is told; the prompt is read from the start each time, as by the others.

    Attributes:
        done: What was decoded last.
    """

    def __init__(self, decoder: Decoder, request: Request) -> None:
        self.decoder, self.request = decoder, request
        self.done: Sequence | None = None

    def __call__(self, num_tokens: int) -> list[int]:
        """Tokens of the reply."""
        self.decoder.prefixes.clear()
        sampling = self.request.sampling.updated(max_new_tokens=num_tokens)
        self.done = self.decoder.run([replace(self.request, sampling=sampling)])[0]
        return self.done.token_ids

    @property
    def num_published_forwards(self) -> int:
        """What the published procedure runs for the same reply: one for each candidate visited, and tokens unasked."""
        return self.done.stats.accepted + self.done.stats.rejected + self.done.stats.single

    @property
    def share_accepted(self) -> float:
        """Of the candidates visited."""
        return self.done.stats.accepted / max(1, self.done.stats.accepted + self.done.stats.rejected)


def show_profile(ours: Ours, num_tokens: int) -> None:
    """Print which operations the time after the first token goes to; what is in none of them is Python's."""
    ours(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as one:
        ours(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as whole:
        taken_s, _ = seconds(lambda: ours(num_tokens))
    shares = {event.key: event.self_cpu_time_total for event in whole.key_averages()}
    for event in one.key_averages():
        shares[event.key] = shares.get(event.key, 0.0) - event.self_cpu_time_total
    print(f"{1e3 * taken_s / num_tokens:.0f} ms a token under the profiler; after the first, by operation:")
    total = sum(shares.values())
    for name, share in sorted(shares.items(), key=lambda item: -item[1])[:8]:
        print(f"  {name:<52} {share / total:6.1%}")


def main(arguments: list[str] | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Run and print; returns the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument("--rates", type=float, nargs="+", default=list(ACCEPT_RATES))
    parser.add_argument(
        "--parts", nargs="+", choices=_PARTS, default=_PARTS, help="by accept rate, on copies, and where time goes"
    )
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
    states = typical_states(backend, model.hidden_size, prompts)
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

    for rate in args.rates if "rates" in args.parts else ():
        head = random_head(model.hidden_size, inner_sizes=(1024, 256), accept_rate=rate, states=states, seed=1)
        head = head.to(model.device)
        num_tokens = args.tokens if rate >= 0.4 else max(2, args.tokens // 2)  # the published procedure takes long
        decoder = Decoder.measured(backend)  # learns the accept rate
        row = f"accept {rate:g}"
        for _ in range(args.rounds):
            for ids in prompts:
                ours = Ours(decoder, Request(ids, SamplingParams(max_new_tokens=num_tokens, seed=0), head=head))
                contenders: dict[str, Run] = {
                    "generate": partial(generate, model, ids),
                    "gated": ours,
                    "published": partial(generate_published, model.model, head, ids),
                }
                compare(row, ours.request, contenders, ["gated / generate", "gated / published"])
                ratios.add(row, "published: forwards a token", ours.num_published_forwards / num_tokens)
                ratios.add(row, "candidates accepted", ours.share_accepted)
        ratios.show(row)
    head = random_head(model.hidden_size, inner_sizes=(1024, 256), accept_rate=0.95, states=states, seed=1)
    head, decoder = head.to(model.device), Decoder.measured(backend)
    for row, texts in (("ungated", prompts), ("copies, accept 0.95", copies)) if "copies" in args.parts else ():
        for _ in range(args.rounds):
            for ids in texts:
                sampling = SamplingParams(max_new_tokens=args.tokens, seed=0)
                base = Request(ids, sampling, eos_token_ids=model.eos_token_ids)
                contenders = {"generate": partial(generate, model, ids), "ungated": Ours(decoder, base)}
                pairs = ["ungated / generate"]
                if model.model.generation_config.eos_token_id is not None:  # transformers 5.0 asks for it there
                    contenders["prompt lookup"] = partial(generate, model, ids, prompt_lookup_num_tokens=8)
                    pairs.append("prompt lookup / generate")
                if texts is copies:
                    contenders["gated"] = Ours(decoder, replace(base, head=head))
                    pairs = ["gated / generate", *pairs]
                compare(row, base, contenders, pairs)
        ratios.show(row)
    if "profile" in args.parts:
        request = Request(prompts[0], SamplingParams(max_new_tokens=args.tokens), head=head)
        show_profile(Ours(decoder, request), args.tokens)
    print(f"memory at its peak: model {loaded_bytes >> 20} MiB, decoding {peak_bytes() >> 20} MiB")
    ratios.write(args.json, model.name)
    return ratios.rows()


if __name__ == "__main__":
    main()
