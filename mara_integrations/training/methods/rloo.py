"""The `rloo` method: the model generates replies, a reward scores them, and the gate learns from its own decisions.

Round 0 uses replies of the base model; they are on-policy, because an untrained residual head is the base model. In
each further round the gated model generates.

- A reward that scores partial text is asked about every beginning of a reply and about every rejected candidate. f is
  regressed on the advantage of each candidate over what a critic expects (look-ahead): f -> A / sd(A), with
  A = r(text + candidate) - r(text) + gamma V(text + candidate) - V(text).
- A reward of whole replies gives one number a reply. It is compared with the rewards of the same prompt's other replies
  (leave one out), and f follows the clipped policy gradient.

The head's scale is then set to the KL budget. Rounds end when one does not help, measured by the reward on held-out
replies of the gated model itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mara_integrations.data import Dataset
from mara_integrations.engine.gate import accept_logit
from mara_integrations.heads.head import HeadConfig, MARAHead
from mara_integrations.messages import Conversation
from mara_integrations.rewards import Reward, reward_name
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.prompts import limited_prompts, replies_per_prompt
from mara_integrations.training.collect.rewards import check_differ, report_mean, score_replies, with_opinion
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.learning.fit import Table, fit, outputs
from mara_integrations.training.learning.objectives import (
    clipped_policy_loss,
    decision_kl,
    decision_log_probs,
    discounted_returns,
    look_ahead_advantages,
    value_loss,
)
from mara_integrations.training.methods.value import advantages
from mara_integrations.training.records.memory_mapped import joined
from mara_integrations.training.records.store import load_or_compute
from mara_integrations.training.rollouts.decisions import Decisions, decisions_of
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.scoring.held_out import compare_held_out, report_comparison
from mara_integrations.training.scoring.partial_rewards import candidate_gains, prefix_rewards, uses_partial_text
from mara_integrations.training.scoring.scale import decisions_kl, report_scale, scale_on_decisions, set_scale

_ROUNDS, _REPLIES_PER_PROMPT = 2, 4  # defaults where whole replies are scored
_HELD_OUT_SEED, _ROUND_SEED = 500_000, 1_000_000  # offsets larger than any number of replies
_GAMMA = 0.9  # a token is responsible for about the ten tokens that follow
_CLIP, _BETA = 0.3, 0.03  # of the policy gradient; measured on SmolLM2-135M
_MAX_ADVANTAGE = 5.0  # standard deviations, so that one word with an extreme reward counts no more than that
_CRITIC_SIZES = (256, 64)


@dataclass(frozen=True, slots=True)
class PromptSide:
    """One side of the split.

    Attributes:
        data: Rows of the prompts.
        prompts: The prompts.
        replies_per_prompt: Number of replies to generate to each.
        seed: Seed of the first reply.
    """

    data: Dataset
    prompts: list[Conversation]
    replies_per_prompt: int
    seed: int


@dataclass(frozen=True, slots=True)
class Experience:
    """Replies of one round to the prompts of one side, with their rewards.

    Attributes:
        generated: All replies.
        replies: The R replies that the reward has an opinion on.
        rewards: Their rewards, length R.
        decisions: The decisions that generated them.
        prefixes: Rewards of each reply's text after 0, 1, ... T tokens; empty where whole replies are scored.
        gains: By how much each decision's candidate raises the reward, (N,); empty where whole replies are scored.
    """

    generated: list[Reply]
    replies: list[Reply]
    rewards: list[float]
    decisions: Decisions
    prefixes: list[list[float]]
    gains: Tensor

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the replies with a reward."""
        return sum(len(reply.token_ids) for reply in self.replies)


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
    held_out: Experience


def train(run: Run, head: MARAHead) -> MethodResult:
    """Train the head against the run's reward."""
    assert run.plan.reward is not None
    name = reward_name(run.plan.reward)
    return train_on(run, head, name, {name: run.plan.reward})


def train_on(run: Run, head: MARAHead, trained_on: str, rewards: Mapping[str, Reward]) -> MethodResult:
    """Train the head against the reward of the run's plan, and report others.

    Args:
        run: The run.
        head: An untrained head of the residual form.
        trained_on: Name of the reward.
        rewards: All rewards to report, by name.

    Raises:
        DataError: If the reward has no opinion, or the same of all replies.
    """
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
            rounds.append(_experience(run, f"gated replies {number}", side, head, is_partial))
            held_out_rounds.append(best.held_out)
        if is_partial:
            fit_look_ahead(run, f"fit {number + 1}", head, rounds, held_out_rounds)
        else:
            fit_whole(run, f"fit {number + 1}", head, rounds[-1], held_out_rounds[-1])
        set_scale(head, _scale_within_budget(run, head, base))
        gated = _experience(run, f"held-out gated replies {number + 1}", held_out_side, head, is_partial)
        prompts = held_out_side.prompts
        comparison = compare_held_out(run, rewards, held_out_side.data, prompts, base.generated, gated.generated, head)
        report_comparison(run, f"round {number + 1}", comparison)
        # by name: a judge, which is only to report, must not choose among rounds
        change = comparison.rewards.get(trained_on)
        gain = change.difference.mean if change is not None else -math.inf
        if best is not None and gain <= best.gain:
            run.say("  this round did not help: the head stays as it was before")
            break
        weights = {name: tensor.clone() for name, tensor in head.state_dict().items()}
        best = BestRound(gain, weights, head.config.scale, gated)
    assert best is not None
    head.load_state_dict(best.weights)
    # on its own replies, which lie further from the base model, the budget may allow less
    set_scale(head, scale := min(best.scale, _scale_within_budget(run, head, best.held_out, best.scale)))
    decisions = best.held_out.decisions
    kl = decisions_kl(decisions, _scores(head, decisions), scale, best.scale) / best.held_out.num_tokens
    report_scale(run, scale, kl)
    return MethodResult(rewards=rewards, kl_per_token=kl)


def num_rounds(run: Run, is_partial: bool) -> int:
    """Return the largest number of rounds after the first one."""
    if run.config.rounds is not None:
        return run.config.rounds
    return 0 if is_partial else _ROUNDS


def prompt_sides(run: Run, is_partial: bool) -> tuple[PromptSide, PromptSide]:
    """Return the prompts to fit on, and those held out."""
    each = replies_per_prompt(run) if is_partial else run.config.replies_each or _REPLIES_PER_PROMPT
    train_data, held_out_data = run.plan.prompts
    seed = run.config.seed
    return (
        PromptSide(train_data, limited_prompts(run, train_data, each), each, seed),
        PromptSide(held_out_data, limited_prompts(run, held_out_data, each), each, seed + _HELD_OUT_SEED),
    )


def fit_look_ahead(
    run: Run, name: str, head: MARAHead, rounds: Sequence[Experience], held_out_rounds: Sequence[Experience]
) -> None:
    """Fit f to the advantage of each candidate, accepted or rejected, over the value that a critic expects."""
    sides = (rounds, held_out_rounds)
    returns = [_returns(experience) for experience in sides]
    deviation = float(returns[0].std())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.config.seed)
        settings = HeadConfig(form="value", hidden_size=run.model.hidden_size, inner_sizes=_CRITIC_SIZES)
        critic = MARAHead(settings).to(run.model.device)
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
            (values / spread).clamp(-_MAX_ADVANTAGE, _MAX_ADVANTAGE),
        )
        for side, values in zip(sides, targets, strict=True)
    )
    with run.fitting(name) as on_epoch:
        fit(head, train, held_out, _squared_error, run.fit_settings(5e-4), on_epoch)


def fit_whole(run: Run, name: str, head: MARAHead, train: Experience, held_out: Experience) -> None:
    """Fit f by the clipped policy gradient on rewards of whole replies, with the KL to the base model as a penalty."""
    settings = run.fit_settings(5e-4)
    num_replies = max(1, settings.batch_size // run.config.max_reply_tokens)  # a step takes whole replies
    scale = head.config.scale

    def episodes_of(each: Experience) -> Episodes:
        targets = torch.tensor(advantages(each.replies, each.rewards))
        return Episodes(each.decisions, targets, _scores(head, each.decisions))

    def loss(head: MARAHead, episodes: Episodes) -> Tensor:
        return episodes.loss(outputs(head, episodes.decisions.states), scale)

    with run.fitting(name) as on_epoch:
        settings = replace(settings, batch_size=num_replies)
        fit(head, episodes_of(train), episodes_of(held_out), loss, settings, on_epoch)


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
        return clipped_policy_loss(log_ratios, self.advantages[places // width], _CLIP) + _BETA * kl


def _experience(
    run: Run, stage: str, side: PromptSide, head: MARAHead, is_partial: bool, *, is_base: bool = False
) -> Experience:
    """Generate replies and score them; both are stored. Replies the reward has no opinion on are left out."""
    generated = generate_replies(run, stage, side.prompts, side.replies_per_prompt, side.seed, head, is_base=is_base)

    def score() -> dict[str, object]:
        scores = score_replies(run, side.data, side.prompts, generated)
        replies, rewards = map(list, zip(*with_opinion(stage, generated, scores), strict=True))
        stored = {"indices": [i for i, value in enumerate(scores) if value is not None], "rewards": rewards}
        if not is_partial:
            return {**stored, "prefixes": [], "gains": torch.zeros(0)}
        prefixes = prefix_rewards(run, side.data, side.prompts, replies, rewards)
        gains = candidate_gains(run, side.data, side.prompts, replies, prefixes)
        return {**stored, "prefixes": prefixes, "gains": gains}

    data, _ = load_or_compute(run.stored(f"rewards of {stage}"), score)
    replies = [generated[i] for i in data["indices"]]
    report_mean(run, stage, len(generated), data["rewards"])
    return Experience(generated, replies, data["rewards"], decisions_of(replies), data["prefixes"], data["gains"])


def quarter(side: PromptSide, number: int) -> PromptSide:
    """Return a quarter of the prompts, another one each round: gated replies cost as much as the base model's."""
    count = max(1, len(side.prompts) // 4)
    prompts = [side.prompts[(number * count + i) % len(side.prompts)] for i in range(count)]
    return replace(side, prompts=prompts, seed=side.seed + _ROUND_SEED * (number + 1))


def _returns(rounds: Sequence[Experience]) -> Tensor:
    """Return the discounted return from each token of each reply, (all tokens,)."""
    gains = [torch.tensor(prefixes).diff() for each in rounds for prefixes in each.prefixes]
    return torch.cat([discounted_returns(of_reply, _GAMMA) for of_reply in gains])


def _advantages(critic: MARAHead, deviation: float, experience: Experience) -> Tensor:
    """Return the advantage of every decision, (N,)."""
    decisions = experience.decisions
    lengths = torch.tensor([len(reply.token_ids) for reply in experience.replies])
    token = (lengths.cumsum(0) - lengths)[decisions.replies] + decisions.tokens  # index among all tokens
    with torch.inference_mode():
        before = outputs(critic, joined([reply.states[:-1] for reply in experience.replies])) * deviation
        after = outputs(critic, decisions.states) * deviation
    returns = _returns([experience])[token]
    return look_ahead_advantages(decisions.accepted, returns, experience.gains, before[token], after, _GAMMA)


def _table(states: Tensor, targets: Tensor) -> Table:
    return Table(states, targets, torch.ones(len(targets)))


def _squared_error(head: MARAHead, table: Table) -> Tensor:
    return value_loss(outputs(head, table.states), table.targets, table.weights, is_binary=False)


@torch.inference_mode()
def _scores(head: MARAHead, decisions: Decisions) -> Tensor:
    return outputs(head, decisions.states)


def _scale_within_budget(run: Run, head: MARAHead, experience: Experience, sampled_at: float = 0.0) -> float:
    """Return the largest scale within the KL budget, on replies sampled by a gate of the scale `sampled_at`."""
    assert run.kl_budget is not None, "methods that train against a reward have a budget"
    scores = _scores(head, experience.decisions)
    return scale_on_decisions(experience.decisions, scores, run.kl_budget, experience.num_tokens, sampled_at)
