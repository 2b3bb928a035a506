"""Compare the engines, with a Q-head and without, by ratios of tokens/s.

One `.gguf` file on llama.cpp and on transformers, each with a head and without, and `generate()` of transformers. One,
4 and 16 requests at once; decoding is greedy, and no reply ends early. Every contender runs in every round, in turn,
with as many threads; a ratio is of one round. The last row says how far the hidden states of llama.cpp lie from those
of transformers on the dequantised weights, as a share of their size.

    python benchmarks/engines.py [--model smollm2] [--tokens 48] [--rounds 3] [--threads 1] [--json out.json]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measure import Ratios, add_options, seconds
from serve import QUESTIONS

from mara_integrations.engine.backends.protocol import Backend, Segment
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.limits import EngineLimits
from mara_integrations.engine.request import Request
from mara_integrations.engine.workers import backend_of
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Message
from mara_integrations.models.load import LoadedModel, ModelSpec, load_model
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import random_head

LIMITS = EngineLimits(max_live=16, prefix_cache_bytes=0)


class Engine:
    """A loaded model with its decoder.

    Args:
        name: The `.gguf` file or alias.
        engine: Name of the engine.
        threads: Number of threads for a forward.
    """

    def __init__(self, name: str, engine: str, threads: int) -> None:
        kwargs = {"n_threads": threads} if engine == "llama.cpp" else {}
        spec = ModelSpec(name, device="cpu", model_kwargs=kwargs, engine=engine)  # type: ignore[arg-type]
        self.model: LoadedModel = load_model(spec)
        self.backend: Backend = backend_of(self.model, LIMITS)
        self.decoder = Decoder.measured(self.backend, LIMITS)

    def answer(self, prompts: Sequence[list[int]], num_tokens: int, head: MARAHead | None) -> None:
        """Decode replies to all prompts at once."""
        sampling = SamplingParams(max_new_tokens=num_tokens)
        self.decoder.run([Request(ids, sampling, GateParams(), head) for ids in prompts])

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


def main(arguments: list[str] | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Run and print; returns the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16], help="decoded at once")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    cpp, torch_ = (Engine(args.model, name, torch.get_num_threads()) for name in ("llama.cpp", "transformers"))
    head = random_head(cpp.model.hidden_size, "q", inner_sizes=(512, 64))
    ids = [torch_.model.encoder.encode([Message("user", text)]) for text in QUESTIONS]
    ratios = Ratios()
    for _ in range(args.rounds):
        for count in args.requests:
            row, prompts = f"{count} request{'s' * (count > 1)}", (ids * count)[:count]
            turns: dict[str, Callable[[], Any]] = {
                "llama.cpp": lambda: cpp.answer(prompts, args.tokens, None),  # noqa: B023  # called in this turn
                "llama.cpp, Q-head": lambda: cpp.answer(prompts, args.tokens, head),  # noqa: B023
                "transformers": lambda: torch_.answer(prompts, args.tokens, None),  # noqa: B023
                "transformers, Q-head": lambda: torch_.answer(prompts, args.tokens, head),  # noqa: B023
                "generate()": lambda: generate(torch_.model, prompts, args.tokens),  # noqa: B023
            }
            taken = {name: seconds(run)[0] for name, run in turns.items()}
            for name in ("llama.cpp", "transformers"):
                ratios.add(row, f"{name}, Q-head / ungated", taken[name] / taken[f"{name}, Q-head"])
            for name in list(taken)[:-1]:
                ratios.add(row, f"{name} / generate()", taken["generate()"] / taken[name])
            ratios.add(row, "llama.cpp, tokens/s", count * args.tokens / taken["llama.cpp"])
    for one in ids[:8]:
        ours, theirs = cpp.states(one), torch_.states(one)
        ratios.add("hidden states", "difference / size", float((ours - theirs).norm() / theirs.norm()))
    for row in ratios.rows():
        ratios.show(row)
    ratios.write(args.json, cpp.model.name)
    return ratios.rows()


if __name__ == "__main__":
    main()
