"""One contender of `engines.py`, in a process of its own: a model on one engine, with a head or without.

Its settings are the JSON text of the first argument. Each line on standard input is a number of tokens: that many are
decoded for every prompt, and a line of JSON on standard output says how long it took. What engines print goes to
standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from measure import peak_bytes, seconds
from serve import QUESTIONS

from mara_integrations.engine.backends.protocol import Segment
from mara_integrations.engine.limits import EngineLimits
from mara_integrations.engine.request import Request
from mara_integrations.engine.workers import backend_of
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Message
from mara_integrations.models.load import LoadedModel, ModelSpec, load_model
from mara_integrations.runtime import MARAEngine
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import random_head

GENERATE = "generate()"  # what stands in an engine's place for `generate()` of transformers


def loaded_engine(model: str, engine: str, most: int) -> MARAEngine:
    """Return a loaded engine that keeps no prefix.

    Args:
        model: The `.gguf` file, folder or alias.
        engine: Name of the engine.
        most: Most requests at once.
    """
    threads = torch.get_num_threads()
    kwargs: dict[str, Any] = {"n_threads": threads} if engine == "llama.cpp" else {}
    limits = EngineLimits(max_live=most) if engine == "vllm" else EngineLimits(max_live=most, prefix_cache_bytes=0)
    if engine == "vllm":  # what others are not given, either
        kwargs = {"enable_prefix_caching": False, "max_num_seqs": most, "max_model_len": 2048}
        kwargs["kv_cache_memory_bytes"] = 2 << 30
    found = MARAEngine(model, device="cpu", engine=engine, model_kwargs=kwargs, limits=limits)  # type: ignore[arg-type]
    found.load()
    torch.set_num_threads(threads)  # vLLM sets its own
    return found


def version_of(model: LoadedModel) -> str:
    """The package that runs the model."""
    if model.engine == "llama.cpp":
        return str(model.model.library.source)
    return f"{model.engine} {version(model.engine)}" if model.engine == "transformers" else _vllm_version()


def answer(engine: MARAEngine, prompts: Sequence[list[int]], head: MARAHead | None, num_tokens: int) -> None:
    """Decode replies to all prompts at once."""
    sampling = SamplingParams(max_new_tokens=num_tokens)
    engine.generate_batch([Request(ids, sampling, GateParams(), head) for ids in prompts])


def states(model: LoadedModel, prompts: Sequence[list[int]]) -> list[torch.Tensor]:
    """Hidden states of the tokens of each prompt, (T, d) each."""
    backend, found = backend_of(model, EngineLimits(max_live=1, prefix_cache_bytes=0)), []
    for ids in prompts:
        row = backend.open()
        found.append(backend.feed([Segment(row, ids)]).float())
        backend.close(row)
    return found


@torch.inference_mode()
def generate(model: LoadedModel, prompts: Sequence[list[int]], num_tokens: int) -> None:
    """Decode with transformers' own `generate`, prompts padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(one)) + list(one) for one in prompts])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
    length = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
    model.model.generate(input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0, **length)


def head_for(hidden_size: int) -> MARAHead:
    """Return the Q-head that all engines run; it has the size that training chooses.

    Its scale is so small that it changes no token: an engine that drafts may be faster or slower on another text.
    """
    return random_head(hidden_size, "q", inner_sizes=(512, 64), scale=1e-3)


def prompts_of(model: LoadedModel, count: int) -> list[list[int]]:
    """Return so many prompts; from the seventeenth on they repeat themselves."""
    ids = [model.encoder.encode([Message("user", text)]) for text in QUESTIONS]
    return [ids[number % len(ids)] for number in range(count)]


def contender(
    model: str, engine: str, requests: int, *, is_gated: bool
) -> tuple[Callable[[int], None], dict[str, Any]]:
    """Load a model; returns what answers with so many tokens, and facts about it."""
    if engine == GENERATE:
        loaded = load_model(ModelSpec(model, device="cpu"))
        return partial(generate, loaded, prompts_of(loaded, requests)), {}
    one = loaded_engine(model, engine, requests)
    head = head_for(one.model.hidden_size) if is_gated else None
    head_bytes = 0 if head is None else sum(p.numel() * p.element_size() for p in head.parameters())
    facts = {"version": version_of(one.model), "head_bytes": head_bytes}
    return partial(answer, one, prompts_of(one.model, requests), head), facts


def _vllm_version() -> str:
    import vllm

    return f"vllm {vllm.__version__}"


def main() -> None:
    """Load, say that it is done, and answer until there are no more lines."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    if threads := settings.pop("threads"):
        torch.set_num_threads(threads)
    run, facts = contender(**settings)
    run(2)  # what is set up on first use is no part of what is timed
    print(json.dumps(facts), file=said, flush=True)
    for line in sys.stdin:
        taken_s, _ = seconds(partial(run, int(line)))
        print(json.dumps({"seconds": taken_s, "peak_bytes": peak_bytes()}), file=said, flush=True)


if __name__ == "__main__":
    main()
