"""Measure what a sentence would do to greedy replies if its head made no error: the contrast itself in place of q.

At each token the model is fed the reply so far under its prompt alone, under the sentence, and under what the sentence
is contrasted with. What a Q-head is fitted to is so known exactly, for every candidate, and decides the next token.
Perplexity, variety and the judges' preference are printed for each strength, in units of a standard deviation of the
contrast in the base model's greedy replies. It takes three or four forwards a token.

    python benchmarks/exact_contrast.py cheerful --data FOLDER [--strengths 0.5 0.75 1] [--contrast neutral]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from method_tasks import TASKS
from torch import Tensor

from mara_integrations.data.principles import NEUTRAL, under
from mara_integrations.engine.backends.protocol import Segment
from mara_integrations.engine.candidates import rank_candidates
from mara_integrations.engine.gate import gated_log_probs, weighted_log_probs
from mara_integrations.evaluation.metrics import distinct_n, opinions, perplexity_ratio, preference_rate
from mara_integrations.heads.config import HeadConfig
from mara_integrations.messages import Conversation, Message
from mara_integrations.models.load import LoadedModel, ModelSpec, load_model
from mara_integrations.rewards import Reward, Scores
from mara_integrations.rewards.scoring import score
from mara_integrations.runtime import backend_of
from mara_integrations.training.learning.q_objectives import centred

CONTRASTS = ("both", "neutral", "opposite")
_PROMPTS_PER_FORWARD = 32


@dataclass(slots=True)
class Greedy:
    """A greedy reply.

    Attributes:
        token_ids: Its tokens, without the one that ended it.
        log_probs: Log-probabilities of all its tokens under the base model, in nats.
        changes: Differences of the sentence from each sentence that it is contrasted with, (M,) for each live
            candidate of each position.
    """

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    changes: list[Tensor] = field(default_factory=list)


class Decoder:
    """Decodes replies to some prompts by a sentence and what it is contrasted with.

    Args:
        model: The model.
        prompts: The prompts.
        sentence: The sentence.
        others: What it is contrasted with, M sentences.
        length: Largest number of tokens of a reply.
    """

    def __init__(
        self, model: LoadedModel, prompts: Sequence[Conversation], sentence: str, others: Sequence[str], length: int
    ) -> None:
        self._model, self._backend, self._length = model, backend_of(model), length
        readings = [list(prompts), *([under(text, prompt) for prompt in prompts] for text in (sentence, *others))]
        self._contexts = [[model.encoder.encode(prompt) for prompt in reading] for reading in readings]
        self._spreads = torch.ones(len(others))  # of each difference in base replies
        self._sum_spread = 1.0
        self.base = self.decode(0.0)
        self._measure_spreads()

    def _measure_spreads(self) -> None:
        changes = torch.cat([change for reply in self.base for change in reply.changes])  # (N, M)
        self._spreads = changes.std(0)
        self._sum_spread = float((changes / self._spreads).sum(-1).std())

    @torch.inference_mode()
    def decode(self, strength: float) -> list[Greedy]:
        """Return the greedy reply to each prompt under a strength."""
        replies = [Greedy() for _ in self._contexts[0]]
        for start in range(0, len(replies), _PROMPTS_PER_FORWARD):
            self._decode(range(start, min(start + _PROMPTS_PER_FORWARD, len(replies))), replies, strength)
        return replies

    def _decode(self, batch: Sequence[int], replies: Sequence[Greedy], strength: float) -> None:
        rows = [{index: self._backend.open() for index in batch} for _ in self._contexts]
        alive = list(batch)
        logits = [self._feed(row, alive, context) for row, context in zip(rows, self._contexts, strict=True)]
        for place in range(self._length):
            tokens = self._step(logits, [replies[index] for index in alive], strength)
            going_on = [i for i, token in enumerate(tokens) if token not in self._model.eos_token_ids]
            fed = {alive[i]: [tokens[i]] for i in going_on}
            for index, token in fed.items():
                replies[index].token_ids += token
            alive = list(fed)
            if not alive or place + 1 == self._length:
                break
            logits = [self._feed(row, alive, fed) for row in rows]
        for row in (each for reading in rows for each in reading.values()):
            self._backend.close(row)

    def _feed(
        self, rows: Mapping[int, int], alive: Sequence[int], tokens: Mapping[int, Sequence[int]] | Sequence[Any]
    ) -> Tensor:
        """Feed tokens to the row of each reply; return the logits after them, (B, V)."""
        segments = [Segment(rows[index], tokens[index], only_last=True) for index in alive]
        last = torch.tensor([len(segment.token_ids) for segment in segments]).cumsum(0) - 1
        hidden = self._backend.feed(segments)[last]
        return self._backend.next_logits(hidden, [segment.row for segment in segments]).float().cpu()

    def _step(self, logits: Sequence[Tensor], replies: Sequence[Greedy], strength: float) -> list[int]:
        """Return the next token of each reply, and note what the readings say of the candidates."""
        defaults, count = HeadConfig.model_fields, len(replies)
        filters = {name: [defaults[name].default] * count for name in ("top_k", "top_p", "min_candidates")}
        candidates = rank_candidates(logits[0], temperature=[1.0] * count, **filters)
        live, token_ids = candidates.live, candidates.token_ids
        log_probs = gated_log_probs(candidates.hazard_logits, live)
        _, this, *those = (each.gather(1, token_ids) for each in logits)
        changes = torch.stack([centred(this - that, log_probs) for that in those], -1)  # (B, K, M)
        scores = (changes / self._spreads).sum(-1) / self._sum_spread
        chosen = weighted_log_probs(log_probs, scores, strength, live).argmax(-1)
        for row, (reply, column) in enumerate(zip(replies, chosen.tolist(), strict=True)):
            reply.log_probs.append(float(candidates.log_probs[row, column]))
            reply.changes.append(changes[row, live[row]])
        taken: list[int] = token_ids.gather(1, chosen[:, None])[:, 0].tolist()
        return taken


def main(arguments: list[str] | None = None) -> list[str]:
    """Decode, judge and print; returns the lines."""
    args = _parser().parse_args(arguments)
    task, model = TASKS[args.task], load_model(ModelSpec(args.model))
    prompts = [Conversation((Message("user", text),)) for text in task.test_prompts(args.data, model)]
    judges = task.judges(args.data, model)
    sentence, opposite = (str(task.settings[name]) for name in ("principle", "against"))
    others = {"both": (NEUTRAL, opposite), "neutral": (NEUTRAL,), "opposite": (opposite,)}[args.contrast]
    decoder = Decoder(model, prompts, sentence, others, task.reply_tokens)
    base = _scores(model, judges, prompts, decoder.base)
    lines = []
    for strength in args.strengths:
        replies = decoder.decode(strength)
        found = _scores(model, judges, prompts, replies)
        perplexity = perplexity_ratio([each.log_probs for each in decoder.base], [each.log_probs for each in replies])
        variety, of_base = (distinct_n([each.token_ids for each in side]) for side in (replies, decoder.base))
        preferred = "; ".join(
            f"{name} {preference_rate(*opinions(base[name], found[name])[:2]):+.2f}" for name in judges
        )
        lines.append(
            f"{args.task}, contrast {args.contrast}, strength {strength:g}: preferred {preferred}; "
            f"perplexity x {perplexity.mean:.2f}, distinct-2 x {variety / of_base:.2f}"
        )
        print(lines[-1], flush=True)
    return lines


def _scores(
    model: LoadedModel, judges: Mapping[str, Reward], prompts: Sequence[Conversation], replies: Sequence[Greedy]
) -> dict[str, Scores]:
    texts = [model.tokenizer.decode(reply.token_ids, skip_special_tokens=True) for reply in replies]
    return {name: score(judge, [prompt.messages for prompt in prompts], texts) for name, judge in judges.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=[name for name, task in TASKS.items() if "against" in task.settings])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--contrast", choices=CONTRASTS, default="both", help="what the sentence is contrasted with")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 0.75, 1.0])
    parser.add_argument("--model", default="smollm2")
    return parser


if __name__ == "__main__":
    main()
