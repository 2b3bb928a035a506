"""The method `rloo` on residual heads: f learns from the accept/reject decisions that generated the replies.

- A reward that scores partial text is asked about every beginning of a reply and about every rejected candidate. f is
  regressed on the advantage of each candidate over what a critic expects (look-ahead): f -> A / sd(A), with
  A = r(text + candidate) - r(text) + gamma V(text + candidate) - V(text).
- A reward of whole replies gives one number a reply. It is compared with the rewards of the same prompt's other replies
  (leave one out), and f follows the clipped policy gradient.

See `rounds` for what happens around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from mara_integrations.engine.gate import accept_logit
from mara_integrations.heads.head import HeadConfig, MARAHead
from mara_integrations.training.collect.workload import Workload
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.learning.fit import Table, fit, outputs
from mara_integrations.training.learning.objectives import (
    BETA,
    CLIP,
    GAMMA,
    MAX_ADVANTAGE,
    clipped_policy_loss,
    decision_kl,
    decision_log_probs,
    discounted_returns,
    look_ahead_advantages,
    value_loss,
)
from mara_integrations.training.methods.reward_rounds import Experience, RewardLearner, train_on_reward, work_on_reward
from mara_integrations.training.methods.rounds import PromptSide
from mara_integrations.training.methods.value import advantages
from mara_integrations.training.records.memory_mapped import joined
from mara_integrations.training.rollouts.decisions import Decisions, decisions_of
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.scoring.partial_rewards import candidate_gains, prefix_rewards, uses_partial_text
from mara_integrations.training.scoring.scale import decisions_kl, scale_on_decisions

_CRITIC_SIZES = (256, 64)


@dataclass(frozen=True, slots=True)
class DecisionExperience(Experience):
    """Replies with the decisions that generated them.

    Attributes:
        decisions: Decisions of the replies with a reward.
        prefixes: Rewards of each reply's text after 0, 1, ... T tokens; empty where whole replies are scored.
        gains: By how much each decision's candidate raises the reward, (N,); empty where whole replies are scored.
    """

    decisions: Decisions
    prefixes: list[list[float]]
    gains: Tensor


class ResidualLearner(RewardLearner[DecisionExperience]):
    """Fits residual heads; needs only the candidates that the gate visited."""

    stages: ClassVar[Mapping[str, float]] = {"gated replies": 1.0}

    @override
    def score_parts(self, side: PromptSide, replies: Sequence[Reply], rewards: Sequence[float]) -> dict[str, Any]:
        prefixes = prefix_rewards(self.run, side.data, side.prompts, replies, rewards)
        gains = candidate_gains(self.run, side.data, side.prompts, replies, prefixes)
        return {"prefixes": prefixes, "gains": gains}

    @override
    def experience(self, scored: Experience, parts: Mapping[str, Any] | None) -> DecisionExperience:
        prefixes, gains = (parts["prefixes"], parts["gains"]) if parts is not None else ([], torch.zeros(0))
        decisions = decisions_of(scored.replies)
        return DecisionExperience(scored.generated, scored.replies, scored.rewards, decisions, prefixes, gains)

    @override
    def fit_parts(
        self, name: str, rounds: Sequence[DecisionExperience], held_out_rounds: Sequence[DecisionExperience]
    ) -> None:
        """Fit f to the advantage of each candidate, accepted or rejected, over the value that a critic expects."""
        run, sides = self.run, (rounds, held_out_rounds)
        returns = [_returns(experience) for experience in sides]
        deviation = float(returns[0].std())
        critic = _new_critic(run)
        train, held_out = (
            _table(joined([reply.states[:-1] for each in side for reply in each.replies]), values / deviation)
            for side, values in zip(sides, returns, strict=True)
        )
        with run.fitting(f"{name}, critic") as on_epoch:
            fit(critic, train, held_out, _squared_error, run.fit_settings(3e-4), on_epoch)
        targets = [torch.cat([_advantages(critic, deviation, each) for each in side]) / deviation for side in sides]
        spread = float(targets[0].std())
        train, held_out = (
            _table(
                joined([each.decisions.states for each in side]),
                (values / spread).clamp(-MAX_ADVANTAGE, MAX_ADVANTAGE),
            )
            for side, values in zip(sides, targets, strict=True)
        )
        with run.fitting(name) as on_epoch:
            fit(self.head, train, held_out, _squared_error, run.fit_settings(5e-4), on_epoch)

    @override
    def fit_whole(self, name: str, train: DecisionExperience, held_out: DecisionExperience) -> None:
        """Fit f by the clipped policy gradient, with the KL to the base model as a penalty."""
        settings = self.run.fit_settings(5e-4)
        num_replies = max(1, settings.batch_size // self.run.config.max_reply_tokens)  # a step takes whole replies
        scale = self.head.config.scale

        def episodes_of(each: DecisionExperience) -> Episodes:
            targets = torch.tensor(advantages(each.replies, each.rewards))
            return Episodes(each.decisions, targets, _scores(self.head, each.decisions))

        def loss(head: MARAHead, episodes: Episodes) -> Tensor:
            return episodes.loss(outputs(head, episodes.decisions.states), scale)

        with self.run.fitting(name) as on_epoch:
            settings = replace(settings, batch_size=num_replies)
            fit(self.head, episodes_of(train), episodes_of(held_out), loss, settings, on_epoch)

    @override
    def scale_within_budget(self, experience: DecisionExperience, sampled_at: float = 0.0) -> float:
        budget, decisions = self.run.kl_budget, experience.decisions
        assert budget is not None, "methods that train against a reward have a budget"
        scores = _scores(self.head, decisions)
        return scale_on_decisions(decisions, scores, budget, experience.num_tokens, sampled_at)

    @override
    def kl_per_token(self, experience: DecisionExperience, sampled_at: float) -> float:
        scores, scale = _scores(self.head, experience.decisions), self.head.config.scale
        return decisions_kl(experience.decisions, scores, scale, sampled_at) / experience.num_tokens


def train(run: Run, head: MARAHead) -> MethodResult:
    """Train the head against the run's reward."""
    return train_on_reward(ResidualLearner(run, head))


def work(run: Run) -> Workload:
    """Return what `train` will do."""
    return work_on_reward(run, ResidualLearner, is_partial=uses_partial_text(run))


@dataclass(frozen=True, slots=True)
class Episodes:
    """R whole replies to learn from.

    Attributes:
        decisions: Their decisions.
        advantages: Advantage of each reply, (R,).
        sampled_scores: f of each decision when the replies were sampled, (N,).
    """

    decisions: Decisions
    advantages: Tensor
    sampled_scores: Tensor

    def __len__(self) -> int:
        return len(self.decisions)

    def take(self, rows: Tensor) -> Episodes:
        """Return the replies at these indices, in that order."""
        scores = self.sampled_scores[self.decisions.rows(rows)]
        return Episodes(self.decisions.take(rows), self.advantages[rows], scores)

    def loss(self, scores: Tensor, scale: float) -> Tensor:
        """Return the mean loss of the tokens, from f of each decision, (N,)."""
        d = self.decisions
        z, z_sampled = (accept_logit("residual", f, d.hazard_logits, scale) for f in (scores, self.sampled_scores))
        gaps = decision_log_probs(z, d.accepted) - decision_log_probs(z_sampled, d.accepted)
        width = int(d.tokens.max()) + 1 if len(d.tokens) else 1
        places, place = (d.replies * width + d.tokens).unique(return_inverse=True)  # tokens with a decision
        log_ratios = gaps.new_zeros(len(places)).index_add(0, place, gaps)
        kl = decision_kl(z, d.hazard_logits).sum() / max(1, len(places))
        return clipped_policy_loss(log_ratios, self.advantages[places // width], CLIP) + BETA * kl


def _new_critic(run: Run) -> MARAHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.config.seed)
        settings = HeadConfig(form="value", hidden_size=run.model.hidden_size, inner_sizes=_CRITIC_SIZES)
        return MARAHead(settings).to(run.model.device)


def _returns(rounds: Sequence[DecisionExperience]) -> Tensor:
    """Return the discounted return from each token of each reply, (all tokens,)."""
    gains = [torch.tensor(prefixes).diff() for each in rounds for prefixes in each.prefixes]
    return torch.cat([discounted_returns(of_reply, GAMMA) for of_reply in gains])


def _advantages(critic: MARAHead, deviation: float, experience: DecisionExperience) -> Tensor:
    """Return the advantage of every decision, (N,)."""
    decisions = experience.decisions
    lengths = torch.tensor([len(reply.token_ids) for reply in experience.replies])
    token = (lengths.cumsum(0) - lengths)[decisions.replies] + decisions.tokens  # index among all tokens
    with torch.inference_mode():
        before = outputs(critic, joined([reply.states[:-1] for reply in experience.replies])) * deviation
        after = outputs(critic, decisions.states) * deviation
    returns = _returns([experience])[token]
    return look_ahead_advantages(decisions.accepted, returns, experience.gains, before[token], after, GAMMA)


def _table(states: Tensor, targets: Tensor) -> Table:
    return Table(states, targets, torch.ones(len(targets)))


def _squared_error(head: MARAHead, table: Table) -> Tensor:
    return value_loss(outputs(head, table.states), table.targets, table.weights, is_binary=False)


@torch.inference_mode()
def _scores(head: MARAHead, decisions: Decisions) -> Tensor:
    return outputs(head, decisions.states)
