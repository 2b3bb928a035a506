"""Replies that the model generates. Those of the base model are cached for every later run: no method changes them.

A run keeps those that it uses among its own work, too: what it stores beside them, as readings and scores, is of these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial

from mara_integrations.heads.compose import greedy_settings
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Conversation
from mara_integrations.sampling import GateParams
from mara_integrations.training.collect.workload import Generation
from mara_integrations.training.context import Run
from mara_integrations.training.identity import MODEL
from mara_integrations.training.records.store import cache_file, mark_used, share
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.rollouts.storage import load_or_generate
from mara_integrations.training.rollouts.workers import Prefetch, RolloutBatch

_REPLIES_PER_BATCH = 64


def generate_replies(
    run: Run,
    stage: str,
    prompts: Sequence[Conversation],
    replies_per_prompt: int,
    seed: int,
    head: MARAHead | None = None,
    *,
    is_base: bool = False,
    temperature: float = 1.0,
) -> list[Reply]:
    """Return replies that the model generates, gated where a head is given, prompt by prompt.

    Prompts of similar lengths share a batch: short ones would wait for the attention of a long one.

    Args:
        run: The run.
        stage: Name of the stage, unique within the run.
        prompts: Prompts, with the system prompt.
        replies_per_prompt: Number of replies to each prompt.
        seed: Seed; reply j to the i-th shortest prompt draws from seed + i * replies_per_prompt + j.
        head: Head that gates the replies; what it is shown is kept with them.
        is_base: Whether the head is untrained. Its replies are those of the base model, with the candidates that the
            base model passes over.
        temperature: Temperature of the replies; 0 is greedy.
    """
    size = prompts_per_batch(replies_per_prompt)
    order, batches = _batches(run, prompts, replies_per_prompt, seed, head, temperature)
    files = [run.stored(stage, index * size) for index in range(len(batches))]
    is_cached = head is None or is_base
    shared = [cache_file(_cache_key(run, batch)) for batch in batches] if is_cached else []

    def is_stored(index: int) -> bool:
        return files[index].exists() or (is_cached and share(shared[index], files[index]))

    replies: list[Reply] = []
    with run.stage(stage, len(prompts) * replies_per_prompt) as advance:
        prefetch = Prefetch(run.workers, batches, advance)
        for index, file in enumerate(files):
            ahead = range(index, min(index + run.workers.num_workers, len(batches)))
            prefetch.start(i for i in ahead if not is_stored(i))
            generated, was_stored = load_or_generate(file, partial(prefetch.result, index))
            if is_cached:
                if not was_stored:
                    share(file, shared[index])
                mark_used(shared[index])
            if was_stored:
                advance(len(generated))
            for reply in generated:
                reply.prompt_index = order[index * size + reply.prompt_index]
            replies += generated
    return sorted(replies, key=lambda reply: reply.prompt_index)


def num_cached(run: Run, planned: Generation, head: MARAHead | None) -> int:
    """Return how many of the replies of a planned generation are in the cache."""
    if planned.is_gated and not planned.is_base:
        return 0
    _, batches = _batches(run, planned.prompts, planned.replies_per_prompt, planned.seed, head, planned.temperature)
    found = [batch for batch in batches if cache_file(_cache_key(run, batch)).exists()]
    return sum(len(batch.prompts) * batch.replies_per_prompt for batch in found)


def prompts_per_batch(replies_per_prompt: int) -> int:
    """Return the number of prompts whose replies are generated together."""
    return max(1, _REPLIES_PER_BATCH // replies_per_prompt)


def _batches(
    run: Run,
    prompts: Sequence[Conversation],
    replies_per_prompt: int,
    seed: int,
    head: MARAHead | None,
    temperature: float,
) -> tuple[list[int], list[RolloutBatch]]:
    """Return the order of the prompts, by length, and batches of them."""
    size = prompts_per_batch(replies_per_prompt)
    order = sorted(range(len(prompts)), key=lambda i: len(run.model.encoder.encode(prompts[i])))
    changes: dict[str, float] = {"min_candidates": head.config.min_candidates} if head else {}
    gate = None
    if head and temperature == 0:
        greedy = greedy_settings(head, head.config.top_p)
        gate, changes["top_p"] = GateParams(strength=greedy["strength"]), greedy["top_p"]
    sampling = run.sampling(temperature=temperature, **changes)
    batches = [
        RolloutBatch(
            [prompts[i] for i in order[start : start + size]],
            sampling,
            seed + start * replies_per_prompt,
            replies_per_prompt,
            head,
            gate=gate,
        )
        for start in range(0, len(prompts), size)
    ]
    return order, batches


def _cache_key(run: Run, batch: RolloutBatch) -> str:
    """Return a hash of everything that decides base replies: model, device, prompts, sampling and seed."""
    parts = [
        run.identity.hashes[MODEL],
        str(run.model.device.type),
        [run.model.encoder.encode(prompt) for prompt in batch.prompts],
        [run.model.encoder.stop_for(prompt) for prompt in batch.prompts],
        batch.sampling.model_dump(mode="json"),
        batch.replies_per_prompt,
        batch.seed,
        batch.head and ("q" if batch.head.config.form == "q" else "afterstate"),  # which keep other positions
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
