"""The head beside the sentence as a system prompt: each alone, and both together, on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.markup import escape

from mara_integrations.data.principles import under
from mara_integrations.evaluation.metrics import distinct_n, opinions, perplexity_ratio, preference_rate
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Conversation
from mara_integrations.rewards import reward_name
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.rewards import score_replies
from mara_integrations.training.context import Run
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.rollouts.rereading import contexts_of, reread

MAX_PROMPTS = 32
_SEED = 3_000_000  # apart from the seeds of replies to learn from
_DECODINGS = {"sampled": 1.0, "greedy": 0.0}


@dataclass(frozen=True, slots=True)
class Compared:
    """One way to reply, against the base model.

    Attributes:
        decoding: `sampled` at temperature 1, or `greedy`.
        replies: What wrote them.
        agreement: Mean of log p(token | sentence) - log p(token) over the tokens, in nats.
        perplexity_ratio: Perplexity under the base model without the sentence, over that of the base replies.
        distinct_2_ratio: Share of distinct pairs of neighbouring tokens, over that of the base replies.
        judges: Mean score and preference rate against the base replies, by judge.
    """

    decoding: str
    replies: str
    agreement: float
    perplexity_ratio: float
    distinct_2_ratio: float
    judges: dict[str, tuple[float, float]] = field(default_factory=dict)


def beside_the_prompt(run: Run, head: MARAHead, prompts: Sequence[Conversation]) -> dict[str, Any]:
    """Compare base model, sentence, head and both; say the table, and return it as JSON values.

    Args:
        run: The run.
        head: The head, as it is finished.
        prompts: Held-out prompts; without any, there is nothing to compare.
    """
    principle, prompts = run.plan.principle, list(prompts[:MAX_PROMPTS])
    assert principle is not None
    if not prompts:
        return {}
    judges = {reward_name(reward): reward for reward, _ in run.plan.weighted_rewards} | dict(run.plan.judges)
    with_sentence = [under(principle.text, prompt) for prompt in prompts]
    untrained = run.new_head().eval()
    ways = {
        "base model": (untrained, prompts),
        "sentence as system prompt": (untrained, with_sentence),
        "head": (head, prompts),
        "head and sentence": (head, with_sentence),
    }
    rows: list[Compared] = []
    for decoding, temperature in _DECODINGS.items():
        base: tuple[list[Reply], list[tuple[float, ...]], dict[str, Any]] | None = None
        for name, (gating_head, contexts) in ways.items():
            stage, seed = f"{decoding} replies for the table, {name}", run.config.seed + _SEED
            is_base = gating_head is untrained
            replies = generate_replies(
                run, stage, contexts, 1, seed, gating_head, is_base=is_base, temperature=temperature
            )
            plain = _log_probs(run, prompts, replies)
            agreed = [token for reply in _log_probs(run, with_sentence, replies) for token in reply]
            difference = torch.tensor(agreed) - torch.tensor([token for reply in plain for token in reply])
            scores = {
                judge: score_replies(run, run.plan.held_out, prompts, replies, reward=reward)
                for judge, reward in judges.items()
            }
            base = base or (replies, plain, scores)
            variety = [distinct_n([reply.token_ids for reply in side]) for side in (base[0], replies)]
            rows.append(
                Compared(
                    decoding,
                    name,
                    float(difference.mean()),
                    perplexity_ratio(base[1], plain).mean,
                    variety[1] / variety[0] if variety[0] else 1.0,
                    {judge: _judged(base[2][judge], found) for judge, found in scores.items()},
                )
            )
    _say(run, rows, len(prompts))
    run.log("prompt baseline", prompts=len(prompts), rows=[asdict(row) for row in rows])
    return {"prompt_baseline": {"num_prompts": len(prompts), "rows": [asdict(row) for row in rows]}}


def _log_probs(run: Run, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> list[tuple[float, ...]]:
    """Return the log-probabilities of the replies' tokens under the base model, after these prompts."""
    read = reread(run.backend, contexts_of(run.model, prompts, replies), replies)
    return [tuple(part.tolist()) for part in read.tokens.split([len(reply.token_ids) for reply in replies])]


def _judged(base: Sequence[float | None], scores: Sequence[float | None]) -> tuple[float, float]:
    of_base, of_replies, _ = opinions(base, scores)
    if not of_replies:
        return 0.0, 0.0
    return sum(of_replies) / len(of_replies), preference_rate(of_base, of_replies)


def _say(run: Run, rows: Sequence[Compared], num_prompts: int) -> None:
    run.say(
        f"[bold]Beside the prompt[/] on {num_prompts} held-out prompts: agreement with the sentence in nats a token, "
        "perplexity and distinct pairs of tokens against the base model"
    )
    for row in rows:
        parts = [
            f"agreement {row.agreement:+.3f}",
            f"perplexity x {row.perplexity_ratio:.2f}",
            f"distinct x {row.distinct_2_ratio:.2f}",
            *(f"{name} {mean:+.3f} (preferred {rate:+.2f})" for name, (mean, rate) in row.judges.items()),
        ]
        run.say(f"  {row.decoding:<8}{row.replies:<27}{escape(', '.join(parts))}")
