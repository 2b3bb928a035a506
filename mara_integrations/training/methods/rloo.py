"""The `rloo` method: the model writes replies, a reward judges them, the gate learns what its decisions were worth.

The first bank is the base model's own, on-policy because an untrained residual head is the base model; then the gated
model writes, round by round. A reward that takes parts of replies is asked about every beginning and every candidate
that was passed over (look-ahead); one that does not gives a number a reply, which is compared with the prompt's other
replies (leave one out). Rounds end where the last one did not help, judged on held-out replies of the head's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mara_integrations.data import Dataset
from mara_integrations.engine.gate import accept_logit
from mara_integrations.errors import DataError
from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Conversation
from mara_integrations.rewards import Reward, reward_name
from mara_integrations.training import gather
from mara_integrations.training.context import Learned, Run
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
from mara_integrations.training.rollouts.decisions import Decisions, decisions_taken
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.scoring.held_out import judge, report
from mara_integrations.training.scoring.partial_rewards import asks_partial_text, candidate_gains, prefix_worths
from mara_integrations.training.scoring.scale import decisions_kl, report_scale, scale_on_decisions

_ROUNDS, _REPLIES_EACH = 2, 4  # where whole replies are compared and the settings name no number
_HELD_OUT, _ROUND = 500_000, 1_000_000  # apart by more than there are replies: what seeds are counted from
_GAMMA = 0.9  # a token is held to account for about the ten that follow
_CLIP, _BETA = 0.3, 0.03  # of the policy gradient; measured on SmolLM2-135M
_FURTHEST = 5.0  # standard deviations: one word with an extreme score is no more than that
_CRITIC_SIZES = (256, 64)


@dataclass(frozen=True, slots=True)
class Batch:
    """Replies of one round to one side's prompts, judged.

    Attributes:
        written: All of them.
        replies: That the reward has an opinion on.
        worths: Of each reply.
        decisions: By which they were written.
        prefixes: What each reply was worth after 0, 1, ... T tokens; empty for whole replies.
        gains: What each decision's candidate changes, (N,); empty for whole replies.
    """

    written: list[Reply]
    replies: list[Reply]
    worths: list[float]
    decisions: Decisions
    prefixes: list[list[float]]
    gains: Tensor


@dataclass(frozen=True, slots=True)
class Side:
    """One side of the split: its prompts, and how many replies to each."""

    data: Dataset
    prompts: list[Conversation]
    each: int
    seed: int


def learn(run: Run, head: MARAHead) -> Learned:
    """Learn from the run's own reward."""
    assert run.plan.reward is not None
    return teach(run, head, {reward_name(run.plan.reward): run.plan.reward})


def teach(run: Run, head: MARAHead, rewards: Mapping[str, Reward]) -> Learned:
    """Write, judge and fit, round by round.

    Args:
        run: Its plan has the reward that is learnt from.
        head: Of the residual form, untrained.
        rewards: By name, that one first; the others judge what it never sees.

    Raises:
        DataError: If the reward has no opinion, or the same of all replies.
    """
    trained_on = next(iter(rewards))
    rewards, by_parts = {**rewards, **run.plan.judges}, asks_partial_text(run)
    budget = run.config.kl_budget or run.plan.method.kl_budget
    assert budget is not None, "methods that teach by rewards have one"
    if not by_parts:
        run.say("  the reward judges whole replies; --partial-text, if it can judge unfinished ones, teaches far more")
    train, held_out = sides(run, by_parts)
    untrained = run.new_head().eval()
    fitting = [_write(run, "base replies", train, untrained, by_parts, is_base=True)]
    checking = [base := _write(run, "held-out base replies", held_out, untrained, by_parts, is_base=True)]
    _check_differ(fitting[0].worths)
    best: Candidate | None = None
    for number in range(num_rounds(run, by_parts) + 1):
        if best is not None:
            part = _part(run, train, number - 1)
            fitting.append(_write(run, f"gated replies {number}", part, head, by_parts))
            checking.append(best.gated)
        if by_parts:
            fit_look_ahead(run, f"fit {number + 1}", head, fitting, checking)
        else:
            fit_whole(run, f"fit {number + 1}", head, fitting[-1], checking[-1])
        _set_scale(head, _scale(head, base, budget))
        gated = _write(run, f"held-out gated replies {number + 1}", held_out, head, by_parts)
        judgement = judge(run, rewards, held_out.data, held_out.prompts, base.written, gated.written, head)
        report(run, f"round {number + 1}", judgement)
        # by name: a judge, which training is not to see, must not choose among rounds
        opinion = judgement.opinions.get(trained_on)
        gain = opinion.difference.mean if opinion is not None else -math.inf
        if best is not None and gain <= best.gain:
            run.say("  this round did not help: the head stays as it was before it")
            break
        weights = {name: tensor.clone() for name, tensor in head.state_dict().items()}
        best = Candidate(gain, weights, head.config.scale, gated)
    assert best is not None
    head.load_state_dict(best.weights)
    scale = min(best.scale, _scale(head, best.gated, budget, best.scale))  # its own replies lie further out
    _set_scale(head, scale)
    scores, decisions = _scores(head, best.gated.decisions), best.gated.decisions
    kl = decisions_kl(decisions, scores, scale, best.scale) / _num_tokens(best.gated)
    report_scale(run, scale, kl, budget)
    return Learned(rewards=rewards, kl_per_token=kl)


def num_rounds(run: Run, by_parts: bool) -> int:
    """After the base model's replies, at most."""
    if run.config.rounds is not None:
        return run.config.rounds
    return 0 if by_parts else _ROUNDS


def sides(run: Run, by_parts: bool) -> tuple[Side, Side]:
    """What is written for fitting, and for checking."""
    each = gather.replies_each(run) if by_parts else run.config.replies_each or _REPLIES_EACH
    train, held_out = run.plan.prompts
    return (
        Side(train, gather.limited_prompts(run, train, each), each, run.config.seed),
        Side(held_out, gather.limited_prompts(run, held_out, each), each, run.config.seed + _HELD_OUT),
    )


@dataclass(frozen=True, slots=True)
class Candidate:
    """The head as it was after some round, and what it wrote to be judged.

    Attributes:
        gain: In the reward, over the base model.
        weights: Of the head.
        scale: At which it wrote.
        gated: Its replies to held-out prompts.
    """

    gain: float
    weights: dict[str, Tensor]
    scale: float
    gated: Batch


def fit_look_ahead(run: Run, name: str, head: MARAHead, fitting: Sequence[Batch], checking: Sequence[Batch]) -> None:
    """Fit f to what each candidate was worth, taken or passed over, more than was to be expected there.

    A critic says what was to be expected, and what would have followed a candidate that was passed over.
    """
    returns = [_returns(batches) for batches in (fitting, checking)]
    scale = float(returns[0].std())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.config.seed)
        settings = HeadConfig(form="value", hidden_size=run.model.hidden_size, inner_sizes=_CRITIC_SIZES)
        critic = MARAHead(settings).to(run.model.device)
    table, held_out = (
        _table(joined([reply.states[:-1] for batch in batches for reply in batch.replies]), values / scale)
        for batches, values in zip((fitting, checking), returns, strict=True)
    )
    with run.fitting(f"{name}, critic") as on_epoch:
        fit(critic, table, held_out, _squared_error, run.fit_settings(3e-4), on_epoch)
    targets = [
        torch.cat([_advantages(critic, scale, batch) for batch in batches]) / scale for batches in (fitting, checking)
    ]
    spread = float(targets[0].std())
    table, held_out = (
        _table(joined([batch.decisions.states for batch in batches]), (values / spread).clamp(-_FURTHEST, _FURTHEST))
        for batches, values in zip((fitting, checking), targets, strict=True)
    )
    with run.fitting(name) as on_epoch:
        fit(head, table, held_out, _squared_error, run.fit_settings(5e-4), on_epoch)


def fit_whole(run: Run, name: str, head: MARAHead, train: Batch, held_out: Batch) -> None:
    """The clipped policy gradient on what whole replies were worth, with the KL to the base model as a penalty."""
    settings = run.fit_settings(5e-4)
    num_replies = max(1, settings.batch_size // run.config.max_reply_tokens)  # a step takes whole ones
    scale = head.config.scale
    fitting, checking = (
        Episodes(batch.decisions, torch.tensor(advantages(batch.replies, batch.worths)), _scores(head, batch.decisions))
        for batch in (train, held_out)
    )

    def loss(head: MARAHead, part: Episodes) -> Tensor:
        return part.loss(outputs(head, part.decisions.states), scale)

    with run.fitting(name) as on_epoch:
        fit(head, fitting, checking, loss, replace(settings, batch_size=num_replies), on_epoch)


@dataclass(frozen=True, slots=True)
class Episodes:
    """Whole replies to learn from.

    Attributes:
        decisions: By which they were written.
        advantages: Of each reply, (R,).
        written: f of each decision when they were written, (N,).
    """

    decisions: Decisions
    advantages: Tensor
    written: Tensor

    def __len__(self) -> int:
        return len(self.decisions)

    def take(self, rows: Tensor) -> Episodes:
        """The named replies."""
        return Episodes(self.decisions.take(rows), self.advantages[rows], self.written[self.decisions.rows(rows)])

    def loss(self, scores: Tensor, scale: float) -> Tensor:
        """Of scores f of the decisions, (N,); a scalar."""
        d = self.decisions
        z, z_written = (accept_logit("residual", f, d.hazard_logits, scale) for f in (scores, self.written))
        gaps = decision_log_probs(z, d.accepted) - decision_log_probs(z_written, d.accepted)
        width = int(d.tokens.max()) + 1 if len(d.tokens) else 1
        places, place = (d.replies * width + d.tokens).unique(return_inverse=True)  # tokens that were decided
        log_ratios = gaps.new_zeros(len(places)).index_add(0, place, gaps)
        kl = decision_kl(z, d.hazard_logits).sum() / max(1, len(places))
        return clipped_policy_loss(log_ratios, self.advantages[places // width], _CLIP) + _BETA * kl


def _write(run: Run, name: str, side: Side, head: MARAHead, by_parts: bool, *, is_base: bool = False) -> Batch:
    """Replies of a gate and what the reward says of them, both kept; those it has no opinion on teach nothing."""
    replies = gather.sample(run, name, side.prompts, side.each, side.seed, head, is_base=is_base)

    def worth() -> dict[str, object]:
        values = gather.scores(run, side.data, side.prompts, replies)
        known = [i for i, value in enumerate(values) if value is not None]
        if not known:
            message = f"the reward had no opinion on any of {len(replies)} {name}"
            raise DataError(message, hint="check the reward function")
        judged, worths = [replies[i] for i in known], [value for value in values if value is not None]
        if not by_parts:
            return {"known": known, "worths": worths, "prefixes": [], "gains": torch.zeros(0)}
        prefixes = prefix_worths(run, side.data, side.prompts, judged, worths)
        gains = candidate_gains(run, side.data, side.prompts, judged, prefixes)
        return {"known": known, "worths": worths, "prefixes": prefixes, "gains": gains}

    data, _ = load_or_compute(run.folder / f"worth-of-{name.replace(' ', '-')}.pt", worth)
    judged = [replies[i] for i in data["known"]]
    mean = sum(data["worths"]) / len(judged)
    run.log("rewards", stage=name, replies=len(replies), judged=len(judged), mean_reward=mean)
    run.say(f"  mean reward of {len(judged)} {name}: {mean:+.3f}")
    return Batch(replies, judged, data["worths"], decisions_taken(judged), data["prefixes"], data["gains"])


def _part(run: Run, side: Side, number: int) -> Side:
    """A quarter of the prompts, another one each round: gated replies cost as much as the base model's."""
    count = max(1, len(side.prompts) // 4)
    prompts = [side.prompts[(number * count + i) % len(side.prompts)] for i in range(count)]
    return replace(side, prompts=prompts, seed=side.seed + _ROUND * (number + 1))


def _check_differ(worths: Sequence[float]) -> None:
    if len(set(worths)) == 1:
        message = f"the reward gave every reply {worths[0]}: nothing to learn from"
        raise DataError(message, hint="check the reward function")


def _returns(batches: Sequence[Batch]) -> Tensor:
    """Discounted gains from each token of each reply on, (all tokens,)."""
    gains = [torch.tensor(prefixes).diff() for batch in batches for prefixes in batch.prefixes]
    return torch.cat([discounted_returns(of_reply, _GAMMA) for of_reply in gains])


def _advantages(critic: MARAHead, scale: float, batch: Batch) -> Tensor:
    """Of every decision of a batch, (N,)."""
    lengths = torch.tensor([len(reply.token_ids) for reply in batch.replies])
    token = (lengths.cumsum(0) - lengths)[batch.decisions.replies] + batch.decisions.tokens  # among all tokens
    with torch.inference_mode():
        before = outputs(critic, joined([reply.states[:-1] for reply in batch.replies])) * scale
        after = outputs(critic, batch.decisions.states) * scale
    taken = _returns([batch])[token]
    return look_ahead_advantages(batch.decisions.accepted, taken, batch.gains, before[token], after, _GAMMA)


def _table(states: Tensor, targets: Tensor) -> Table:
    return Table(states, targets, torch.ones(len(targets)))


def _squared_error(head: MARAHead, table: Table) -> Tensor:
    return value_loss(outputs(head, table.states), table.targets, table.weights, is_binary=False)


@torch.inference_mode()
def _scores(head: MARAHead, decisions: Decisions) -> Tensor:
    return outputs(head, decisions.states)


def _scale(head: MARAHead, batch: Batch, budget: float, written_at: float = 0.0) -> float:
    """Within the KL budget, on replies that a gate of the scale `written_at` wrote."""
    scores = _scores(head, batch.decisions)
    return scale_on_decisions(batch.decisions, scores, budget, _num_tokens(batch), written_at)


def _num_tokens(batch: Batch) -> int:
    return sum(len(reply.token_ids) for reply in batch.replies)


def _set_scale(head: MARAHead, scale: float) -> None:
    head.config = head.config.model_copy(update={"scale": scale})
