"""Results of an evaluation: both replies to every prompt, and the figures of the two sides."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields

from mara_integrations.engine.generation import FinishReason, GateStats
from mara_integrations.evaluation.marks import Mark
from mara_integrations.evaluation.metrics import Interval
from mara_integrations.messages import Message
from mara_integrations.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply, with what each reward says of it."""

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: FinishReason
    scores: dict[str, float | None]

    @property
    def mean_log_prob(self) -> float:
        """Mean log-probability of its tokens under the base model, in nats."""
        return math.fsum(self.log_probs) / len(self.log_probs) if self.log_probs else 0.0


@dataclass(frozen=True, slots=True)
class Example:
    """Both replies to one prompt.

    Attributes:
        prompt: The conversation.
        source: The prompt's file and line, or its number.
        seed: Seed of both replies.
        base: At strength 0.
        gated: With the head.
        marks: Token by token of the gated reply.
    """

    prompt: tuple[Message, ...]
    source: str
    seed: int
    base: Reply
    gated: Reply
    marks: tuple[Mark, ...]

    @property
    def is_changed(self) -> bool:
        """Whether the replies differ."""
        return self.base.token_ids != self.gated.token_ids

    def gain(self, reward: str) -> float:
        """Return how much higher the gated reply scores; 0 where the reward has no opinion on one of them."""
        base, gated = self.base.scores.get(reward), self.gated.scores.get(reward)
        return 0.0 if base is None or gated is None else gated - base


@dataclass(frozen=True, slots=True)
class Side:
    """Measures of one side's replies.

    Attributes:
        num_tokens: Number of tokens of all replies.
        mean_length: Mean length of a reply, in tokens.
        ended: Share of replies that came to their own end before `max_new_tokens`.
        perplexity: Under the base model, pooled over tokens.
        distinct_2: Share of token pairs that are distinct, pooled over replies.
        forwards_per_token: Tokens the model was run on for one token of a reply; what exceeds 1 is the cost of
            the gate, and of drafts that were wrong.
        tokens_per_s: Replies' tokens over wall time, all batches.
    """

    num_tokens: int
    mean_length: float
    ended: float
    perplexity: float
    distinct_2: float
    forwards_per_token: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Scores of one reward on the two sides; the measures are None where it has no opinion on any pair.

    Attributes:
        num_pairs: Prompts on which it has an opinion on both replies; all else counts only these.
        num_dropped: The other prompts.
        base_mean: Mean reward of the base replies.
        gated_mean: Mean reward of the gated replies.
        difference: gated_mean - base_mean.
        preference: (wins - losses) / num_pairs.
        wins: Prompts on which the gated reply scores higher.
        ties: Prompts on which both score the same.
        losses: Prompts on which the base reply scores higher.
        base_compliance: Share of base replies that score 1, for rewards that say only 0 and 1.
        gated_compliance: Share of gated replies that score 1, for the same rewards.
        num_fine: Base replies that were fine already: those that score 1, for rewards that say only 0 and 1, else those
            that score at least the median.
        fine_changed: Share of these that the head changed; an edit there can only harm.
        fine_worse: Number of these whose gated reply scores lower.
    """

    num_pairs: int
    num_dropped: int
    base_mean: float | None = None
    gated_mean: float | None = None
    difference: Interval | None = None
    preference: Interval | None = None
    wins: int = 0
    ties: int = 0
    losses: int = 0
    base_compliance: Interval | None = None
    gated_compliance: Interval | None = None
    num_fine: int = 0
    fine_changed: Interval | None = None
    fine_worse: int = 0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Base model against gate.

    Attributes:
        model: Name of the base model.
        head: Where the head came from, see `head_name`.
        form: The head's form.
        strength: Dial on the head.
        sampling: Settings of the gated replies. The base replies share them but for `min_candidates`, which is the
            gate's own need. `seed` is the first prompt's; each next prompt's is one more.
        base: At strength 0.
        gated: With the head.
        perplexity_ratio: Gated over base.
        speed_ratio: The gated side's tokens/s over the base side's, timed in turns, batch by batch.
            Noisy: replies differ in length, and the machine may be busy.
        gate: Counts of the gate's decisions, summed over the gated replies.
        rewards: Comparison by reward; of a sum of rewards, the sum and each part.
        examples: Every prompt, in order.
    """

    model: str
    head: str
    form: str
    strength: float
    sampling: SamplingParams
    base: Side
    gated: Side
    perplexity_ratio: Interval
    speed_ratio: float
    gate: GateStats
    rewards: dict[str, Comparison]
    examples: tuple[Example, ...]

    @property
    def extra_forwards(self) -> float:
        """Forwards a token that the gate costs on top of the base model's own."""
        return self.gated.forwards_per_token - self.base.forwards_per_token

    def regressions(self, count: int) -> list[int]:
        """Return the numbers of the examples that the head harmed most, worst first.

        Changed replies that score lower come first. Then come those that score the same and are the least likely under
        the base model: what no reward sees, such as a fact that is lost, is found among these.
        """
        reward = next(iter(self.rewards), "")
        harms = [
            (example.gain(reward), example.gated.mean_log_prob - example.base.mean_log_prob, number)
            for number, example in enumerate(self.examples)
            if example.is_changed
        ]
        return [number for gain, drop, number in sorted(harms) if gain < 0 or (gain == 0 and drop < 0)][:count]

    def to_json(self) -> str:
        """Everything, as one JSON object."""
        whole = {field.name: getattr(self, field.name) for field in fields(self)}
        whole["sampling"] = self.sampling.model_dump()
        whole["extra_forwards"] = self.extra_forwards
        whole["examples"] = [
            {**asdict(item), "prompt": [{"role": m.role, "content": m.content} for m in item.prompt]}
            for item in self.examples
        ]
        return json.dumps(whole, default=asdict, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
