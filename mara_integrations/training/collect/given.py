"""Replies that the data brings, with their labels, and the states or decisions of the model that reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from mara_integrations.data import Dataset, Labelled, Pair, PromptRow
from mara_integrations.training.collect.prompts import conversation, distinct_prompts
from mara_integrations.training.context import Run
from mara_integrations.training.identity import MODEL
from mara_integrations.training.records.store import as_dict, cache_file, load_or_compute, mark_used
from mara_integrations.training.rollouts.decisions import Decisions, read_decisions
from mara_integrations.training.rollouts.replies import GivenReply, Reply, encode_given, read_replies
from mara_integrations.training.rollouts.storage import load_or_generate

_REPLIES_PER_FILE = 256


def given_replies(run: Run, data: Dataset) -> tuple[list[GivenReply], list[float]]:
    """Return the replies of data, and their labels: 1 for a good one, 0 for a bad one."""
    replies: list[GivenReply] = []
    labels: list[float] = []
    index = {prompt: i for i, prompt in enumerate(distinct_prompts(run, data))}
    for row in data.rows:
        prompt = conversation(run, row)
        names = {Pair: ("chosen", "rejected"), Labelled: ("completion",), PromptRow: ()}[type(row)]
        for name in names:
            replies.append(GivenReply(index[prompt], prompt, getattr(row, name)))
            labels.append(float(row.label if isinstance(row, Labelled) else name == "chosen"))
    return replies, labels


def read_states(run: Run, stage: str, given: Sequence[GivenReply]) -> list[Reply]:
    """Feed given replies to the model and return them with their hidden states.

    They are cached for every later run, whatever its method.
    """
    replies: list[Reply] = []
    with run.stage(stage, len(given)) as advance:
        for part in _parts(given):
            file, max_tokens = _file_of(run, part), run.config.max_reply_tokens
            read = partial(read_replies, run.model, run.backend, part, max_tokens=max_tokens, on_reply=advance)
            found, was_stored = load_or_generate(file, read)
            mark_used(file)
            if was_stored:
                advance(len(found))
            for reply, each in zip(found, part, strict=True):
                reply.prompt_index = each.prompt_index  # a run with other rows numbers the prompts differently
            replies += found
    return replies


def num_read_before(run: Run, given: Sequence[GivenReply]) -> int:
    """Return how many given replies `read_states` will find in the cache."""
    return sum(len(part) for part in _parts(given) if _file_of(run, part).exists())


def _parts(given: Sequence[GivenReply]) -> list[Sequence[GivenReply]]:
    return [given[start : start + _REPLIES_PER_FILE] for start in range(0, len(given), _REPLIES_PER_FILE)]


def _file_of(run: Run, given: Sequence[GivenReply]) -> Path:
    """Return the file in the cache for the states of these replies: its name is a hash of model, device and tokens."""
    encoded = [(reply.text, *encode_given(run.model, reply, run.config.max_reply_tokens)) for reply in given]
    parts = ["given replies", run.identity.hashes[MODEL], run.model.device.type, encoded]
    return cache_file(hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32])


def read_as_decisions(run: Run, stage: str, given: Sequence[GivenReply], max_competitors: int) -> Decisions:
    """Feed given replies to the model and return the decisions that would generate them; see `read_decisions`."""
    parts = []
    with run.stage(stage, len(given)) as advance:
        for number, part in enumerate(_parts(given)):
            read = partial(
                read_decisions,
                run.model,
                run.backend,
                part,
                sampling=run.sampling(),
                max_competitors=max_competitors,
                on_reply=advance,
            )
            found, was_stored = load_or_compute(run.stored(stage, number), partial(_as_data, read))
            parts.append(Decisions(**found))
            if was_stored:
                advance(len(parts[-1]))
    return Decisions.join(parts)


def _as_data(read: Callable[[], Decisions]) -> dict[str, Tensor]:
    return as_dict(read())
