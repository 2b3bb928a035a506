"""The method `rloo` on Q-heads: train against a reward of the model's own replies, one forward a token.

Round 0 learns from replies of the base model, which are cached and serve every reward; further rounds from the gated
model's own, sampled and greedy. A reward that scores partial text tells what each candidate of each position changes at
once; a critic, itself a Q-head, what follows it. The head is fitted to the advantage of every candidate, taken or not.
Rewards of whole replies are compared among replies to the same prompt (leave one out) in a policy gradient on the
gate's distribution, which is known in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.rewards import Reward, reward_name
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.rewards import check_differ, report_mean, score_replies, with_opinion
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.learning.fit import fit
from mara_integrations.training.learning.objectives import clipped_policy_loss, discounted_returns
from mara_integrations.training.learning.q_objectives import (
    candidate_advantages,
    mean_kl,
    score_loss,
    taken_log_ratios,
)
from mara_integrations.training.methods.rloo import PromptSide, num_rounds, prompt_sides, quarter
from mara_integrations.training.methods.value import advantages
from mara_integrations.training.records.store import load_or_compute
from mara_integrations.training.rollouts.positions import Positions, all_scores, q_scores
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.scoring.held_out import compare_held_out, report_comparison
from mara_integrations.training.scoring.partial_rewards import position_gains, prefix_rewards, uses_partial_text
from mara_integrations.training.scoring.q_scale import hold_quality, kl_per_token, scale_within_budget
from mara_integrations.training.scoring.scale import report_scale, set_scale

_GAMMA = 0.9  # a token is responsible for about the ten tokens that follow
_CLIP, _BETA = 0.3, 0.03  # of the policy gradient
_MAX_ADVANTAGE = 5.0  # standard deviations, so that one word with an extreme reward counts no more than that
# Candidates of a position that are scored: those after them have 3 % of the probability together. The one taken counts
# wherever it stands.
_NUM_SCORED = 12
_POSITIONS_PER_STEP = 1024


@dataclass(frozen=True, slots=True)
class QExperience:
    """Replies of one round to the prompts of one side, with their rewards and positions.

    Attributes:
        generated: All replies.
        replies: The R replies that the reward has an opinion on.
        rewards: Their rewards, length R.
        positions: Positions of these replies, with all candidates.
        scored: The same positions with the candidates that were scored alone.
        gains: By how much each of these raises the reward, (P, K); empty where whole replies are scored.
        returns: Discounted return of the token taken at each position, (P,); empty where whole replies are scored.
    """

    generated: list[Reply]
    replies: list[Reply]
    rewards: list[float]
    positions: Positions
    scored: Positions
    gains: Tensor
    returns: Tensor


@dataclass(frozen=True, slots=True)
class Targets:
    """Positions with what q of each candidate is to be.

    Attributes:
        positions: P positions.
        values: Targets, (P, K).
    """

    positions: Positions
    values: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, rows: Tensor) -> Targets:
        """Return the positions at these indices, in that order."""
        return Targets(self.positions.take(rows), self.values[rows])


@dataclass(frozen=True, slots=True)
class Episodes:
    """Positions of whole replies to learn from.

    Attributes:
        positions: P positions.
        advantages: Advantage of the reply that each belongs to, (P,).
        sampled: Log-ratio of the token taken, gate over base, when the replies were sampled, (P,).
    """

    positions: Positions
    advantages: Tensor
    sampled: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, rows: Tensor) -> Episodes:
        """Return the positions at these indices, in that order."""
        return Episodes(self.positions.take(rows), self.advantages[rows], self.sampled[rows])


@dataclass(frozen=True, slots=True)
class BestRound:
    """The head after the best round so far.

    Attributes:
        gain: Mean reward of its held-out replies less that of the base model's.
        weights: Weights of the head.
        scale: Scale of the head.
        held_out: Its held-out replies.
    """

    gain: float
    weights: dict[str, Tensor]
    scale: float
    held_out: QExperience


def train(run: Run, head: MARAHead) -> MethodResult:
    """Train the head against the run's reward."""
    assert run.plan.reward is not None
    name = reward_name(run.plan.reward)
    return train_on(run, head, name, {name: run.plan.reward})


def train_on(run: Run, head: MARAHead, trained_on: str, rewards: Mapping[str, Reward]) -> MethodResult:
    """Train the head against the reward of the run's plan, and report others; see `rloo.train_on`."""
    assert isinstance(head, QHead)
    rewards, is_partial = {**rewards, **run.plan.judges}, uses_partial_text(run)
    if not is_partial:
        run.say("  the reward scores whole replies; if it can score unfinished ones, --partial-text learns much more")
    train_side, held_out_side = prompt_sides(run, is_partial)
    untrained = run.new_head().eval()
    rounds = [_experience(run, "base replies", train_side, untrained, is_partial, is_base=True)]
    base = _experience(run, "held-out base replies", held_out_side, untrained, is_partial, is_base=True)
    held_out_rounds = [base]
    check_differ(rounds[0].rewards)
    best: BestRound | None = None
    for number in range(num_rounds(run, is_partial) + 1):
        if best is not None:
            side = quarter(train_side, number - 1)
            for temperature in (1.0, 0.0):
                stage = f"{'sampled' if temperature else 'greedy'} gated replies {number}"
                rounds.append(_experience(run, stage, side, head, is_partial, temperature=temperature))
            held_out_rounds.append(best.held_out)
        if is_partial:
            fit_candidates(run, f"fit {number + 1}", head, rounds, held_out_rounds)
        else:
            fit_whole(run, f"fit {number + 1}", head, rounds[-1], held_out_rounds[-1])
        set_scale(head, scale_within_budget(run, head, base.positions))
        gated = _experience(run, f"held-out gated replies {number + 1}", held_out_side, head, is_partial)
        comparison = compare_held_out(
            run, rewards, held_out_side.data, held_out_side.prompts, base.generated, gated.generated, head
        )
        report_comparison(run, f"round {number + 1}", comparison)
        change = comparison.rewards.get(trained_on)  # by name: a judge is only to report
        gain = change.difference.mean if change is not None else -math.inf
        if best is not None and gain <= best.gain:
            run.say("  this round did not help: the head stays as it was before")
            break
        weights = {name: tensor.clone() for name, tensor in head.state_dict().items()}
        best = BestRound(gain, weights, head.config.scale, gated)
    assert best is not None
    head.load_state_dict(best.weights)
    # on its own replies, which lie further from the base model, the budget may allow less
    set_scale(head, min(best.scale, scale_within_budget(run, head, best.held_out.positions)))
    hold_quality(run, head, held_out_side.prompts, held_out_side.seed)
    positions = best.held_out.positions
    scores = all_scores(head, positions, run.backend.output_embeddings)
    kl = kl_per_token(positions, scores, head.config.scale)
    report_scale(run, head.config.scale, kl)
    return MethodResult(rewards=rewards, kl_per_token=kl)


def fit_candidates(
    run: Run, name: str, head: QHead, rounds: Sequence[QExperience], held_out_rounds: Sequence[QExperience]
) -> None:
    """Fit q to the advantage of each candidate, by its gain, and by what a critic says that follows it."""
    sides = (rounds, held_out_rounds)
    positions = [Positions.join([each.scored for each in side]) for side in sides]
    gains = [torch.cat([each.gains for each in side]) for side in sides]
    returns = [torch.cat([each.returns for each in side]) for side in sides]
    following = [
        of_taken - of_all.gather(1, where.taken[:, None])[:, 0]
        for of_taken, of_all, where in zip(returns, gains, positions, strict=True)
    ]
    critic, embeddings = _new_critic(run), run.backend.output_embeddings
    deviation = float(following[0].std()) or 1.0
    targets = [
        Targets(where.only_taken(), values[:, None] / deviation)
        for where, values in zip(positions, following, strict=True)
    ]
    regress(run, f"{name}, critic", critic, *targets)
    values = [
        candidate_advantages(
            of_all, all_scores(critic, where, embeddings) * deviation, where.taken, of_taken, where.log_probs
        )
        for of_all, of_taken, where in zip(gains, returns, positions, strict=True)
    ]
    spread = float(values[0][positions[0].live].std()) or 1.0
    targets = [
        Targets(where, (target / spread).clamp(-_MAX_ADVANTAGE, _MAX_ADVANTAGE))
        for where, target in zip(positions, values, strict=True)
    ]
    regress(run, name, head, *targets)


def fit_whole(run: Run, name: str, head: QHead, train: QExperience, held_out: QExperience) -> None:
    """Fit q by the clipped policy gradient on rewards of whole replies, with the KL to the base model as a penalty."""
    embeddings, scale = run.backend.output_embeddings, head.config.scale
    assert len(train.positions) and len(held_out.positions), "replies with a choice"

    def episodes_of(each: QExperience) -> Episodes:
        of_replies = torch.tensor(advantages(each.replies, each.rewards))
        scores, where = all_scores(head, each.positions, embeddings), each.positions
        sampled = taken_log_ratios(scores, where.log_probs, where.taken, scale)
        return Episodes(where, of_replies[where.replies], sampled)

    def loss(head: MARAHead, episodes: Episodes) -> Tensor:
        assert isinstance(head, QHead)
        where = episodes.positions
        scores = q_scores(head, where.states, where.token_ids, embeddings)
        ratios = taken_log_ratios(scores, where.log_probs, where.taken, scale) - episodes.sampled
        penalty = _BETA * mean_kl(scores, where.log_probs, scale)
        return clipped_policy_loss(ratios, episodes.advantages, _CLIP) + penalty

    with run.fitting(name) as on_epoch:
        fit(head, episodes_of(train), episodes_of(held_out), loss, run.fit_settings(5e-4), on_epoch)


def regress(run: Run, name: str, head: QHead, train: Targets, held_out: Targets) -> None:
    """Fit q of each candidate to its target."""
    embeddings = run.backend.output_embeddings

    def loss(head: MARAHead, part: Targets) -> Tensor:
        assert isinstance(head, QHead)
        where = part.positions
        return score_loss(q_scores(head, where.states, where.token_ids, embeddings), part.values, where.log_probs)

    with run.fitting(name) as on_epoch:
        settings = replace(run.fit_settings(1e-3), batch_size=_POSITIONS_PER_STEP)
        fit(head, train, held_out, loss, settings, on_epoch)


def _new_critic(run: Run) -> QHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.config.seed)
        return QHead(HeadConfig(form="q", hidden_size=run.model.hidden_size)).to(run.model.device)


def _experience(
    run: Run,
    stage: str,
    side: PromptSide,
    head: QHead | MARAHead,
    is_partial: bool,
    *,
    is_base: bool = False,
    temperature: float = 1.0,
) -> QExperience:
    """Generate replies and score them; both are stored. Replies the reward has no opinion on are left out."""
    generated = generate_replies(
        run, stage, side.prompts, side.replies_per_prompt, side.seed, head, is_base=is_base, temperature=temperature
    )

    def score() -> dict[str, object]:
        scores = score_replies(run, side.data, side.prompts, generated)
        replies, rewards = map(list, zip(*with_opinion(stage, generated, scores), strict=True))
        stored = {"indices": [i for i, value in enumerate(scores) if value is not None], "rewards": rewards}
        if not is_partial:
            return {**stored, "gains": torch.zeros(0), "returns": torch.zeros(0)}
        prefixes = prefix_rewards(run, side.data, side.prompts, replies, rewards)
        where = Positions.of(replies).narrowed(_NUM_SCORED)
        gains = position_gains(run, side.data, side.prompts, replies, prefixes, where)
        returns = [discounted_returns(torch.tensor(of_reply).diff(), _GAMMA) for of_reply in prefixes]
        at_positions = [
            of_reply[[position.index for position in reply.positions]]
            for of_reply, reply in zip(returns, replies, strict=True)
        ]
        return {**stored, "gains": gains, "returns": torch.cat(at_positions)}

    data, _ = load_or_compute(run.stored(f"rewards of {stage}"), score)
    replies = [generated[i] for i in data["indices"]]
    report_mean(run, stage, len(generated), data["rewards"])
    where = Positions.of(replies)
    return QExperience(
        generated, replies, data["rewards"], where, where.narrowed(_NUM_SCORED), data["gains"], data["returns"]
    )
