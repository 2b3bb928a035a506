"""Compare the engines, with a Q-head and without, by ratios of tokens/s.

One `.gguf` file on each engine, with a head and without, and `generate()` of transformers. One, 4 and 16 requests at
once; decoding is greedy, and no reply ends early. Every contender runs in every round, in turn, with as many threads; a
ratio is of one round. A reply of one token tells the time to the first, prompt included. The last row says how far the
hidden states of llama.cpp lie from those of transformers on the dequantised weights, as a share of their size.

    python benchmarks/engines.py [--model smollm2] [--engines llama.cpp transformers] [--requests 1 4 16]
        [--tokens 48] [--rounds 3] [--threads 1] [--json out.json]

vLLM (`--engines vllm`) runs where it is installed, and compares with `generate()` there; it ignores `--threads`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from measure import Ratios, add_options, seconds
from serve import QUESTIONS

from mara_integrations.engine.backends.protocol import Segment
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.limits import EngineLimits
from mara_integrations.engine.request import Request
from mara_integrations.engine.vllm_decoder import VLLMDecoder
from mara_integrations.engine.worker import AnyDecoder
from mara_integrations.engine.workers import backend_of
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Message
from mara_integrations.models.load import LoadedModel, ModelSpec, load_model
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import random_head

ENGINES = ("llama.cpp", "transformers", "vllm")


class Engine:
    """A loaded model with its decoder.

    Args:
        name: The `.gguf` file or alias.
        engine: Name of the engine.
        threads: Number of threads for a forward.
        most: Most requests at once.
    """

    def __init__(self, name: str, engine: str, threads: int, most: int) -> None:
        kwargs: dict[str, Any] = {"n_threads": threads} if engine == "llama.cpp" else {}
        if engine == "vllm":  # what others are not given, either
            kwargs = {"enable_prefix_caching": False, "max_num_seqs": most, "max_model_len": 2048}
        spec = ModelSpec(name, device="cpu", model_kwargs=kwargs, engine=engine)  # type: ignore[arg-type]
        self.model: LoadedModel = load_model(spec)
        self.decoder: AnyDecoder
        if engine == "vllm":
            self.decoder = VLLMDecoder(self.model.model, EngineLimits(max_live=most))
        else:
            limits = EngineLimits(max_live=most, prefix_cache_bytes=0)
            self.backend = backend_of(self.model, limits)
            self.decoder = Decoder.measured(self.backend, limits)

    def answer(self, prompts: Sequence[list[int]], num_tokens: int, head: MARAHead | None) -> None:
        """Decode replies to all prompts at once."""
        sampling = SamplingParams(max_new_tokens=num_tokens)
        for ids in prompts:
            self.decoder.submit(Request(ids, sampling, GateParams(), head))
        while not self.decoder.is_idle:
            for sequence in self.decoder.step():
                if sequence.error is not None:
                    raise sequence.error

    def states(self, ids: list[int]) -> torch.Tensor:
        """Hidden states of tokens, (T, d)."""
        row = self.backend.open()
        try:
            return self.backend.feed([Segment(row, ids)]).float()
        finally:
            self.backend.close(row)


@torch.inference_mode()
def generate(model: LoadedModel, prompts: Sequence[list[int]], num_tokens: int) -> None:
    """Decode with transformers' own `generate`, prompts padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(one)) + list(one) for one in prompts])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
    length = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
    model.model.generate(input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0, **length)


def compare(
    ratios: Ratios,
    row: str,
    engines: dict[str, Engine],
    reference: LoadedModel,
    prompts: Sequence[list[int]],
    num_tokens: int,
    head: MARAHead,
) -> None:
    """Run every contender once, and add its ratios."""
    turns: dict[str, Callable[[int], Any]] = {}
    for name, engine in engines.items():
        turns[name] = partial(engine.answer, prompts, head=None)
        turns[f"{name}, Q-head"] = partial(engine.answer, prompts, head=head)
    turns["generate()"] = partial(generate, reference, prompts)
    first = {name: seconds(partial(run, 1))[0] for name, run in turns.items()}
    whole = {name: seconds(partial(run, num_tokens))[0] for name, run in turns.items()}
    for name in engines:
        ratios.add(row, f"{name}, Q-head / ungated", whole[name] / whole[f"{name}, Q-head"])
    for name in list(turns)[:-1]:
        ratios.add(row, f"{name} / generate()", whole["generate()"] / whole[name])
    for name in turns:
        ratios.add(row, f"{name}, tokens/s", len(prompts) * num_tokens / whole[name])
        ratios.add(row, f"{name}, first token, s", first[name])


def main(arguments: list[str] | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Run and print; returns the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16], help="decoded at once")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES[:2]))
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    engines = {name: Engine(args.model, name, torch.get_num_threads(), max(args.requests)) for name in args.engines}
    reference = engines["transformers"].model if "transformers" in engines else load_model(ModelSpec(args.model))
    head = random_head(reference.hidden_size, "q", inner_sizes=(512, 64))
    ids = [reference.encoder.encode([Message("user", text)]) for text in QUESTIONS]
    ratios = Ratios()
    for _ in range(args.rounds):
        for count in args.requests:
            row, prompts = f"{count} request{'s' * (count > 1)}", (ids * count)[:count]
            compare(ratios, row, engines, reference, prompts, args.tokens, head)
    if {"llama.cpp", "transformers"} <= engines.keys():
        for one in ids[:8]:
            ours, theirs = engines["llama.cpp"].states(one), engines["transformers"].states(one)
            ratios.add("hidden states", "difference / size", float((ours - theirs).norm() / theirs.norm()))
    for row in ratios.rows():
        ratios.show(row)
    ratios.write(args.json, reference.name)
    return ratios.rows()


if __name__ == "__main__":
    main()
