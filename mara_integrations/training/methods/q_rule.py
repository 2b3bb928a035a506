"""The method `rule` on Q-heads: label every candidate of every position, and fit the base model without what offends.

The text decides what breaks the rule, so each candidate is labelled exactly, taken or not, without another forward. The
target is the base model's distribution over the candidates that keep to the rule: a reply that was fine should stay as
it was. A correction round labels what the gated model writes and fits again (DAgger).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.models.load import LoadedModel
from mara_integrations.rewards import Rule
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.prompts import limited_prompts, replies_per_prompt
from mara_integrations.training.collect.workload import Generation, Workload
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.learning.fit import Rows
from mara_integrations.training.learning.q_objectives import compliant
from mara_integrations.training.methods.q_wanted import Wanted, fit_wanted
from mara_integrations.training.methods.rule import check_violations, count_violating
from mara_integrations.training.rollouts.positions import Positions, all_scores, join_columns
from mara_integrations.training.rollouts.replies import Reply, token_texts
from mara_integrations.training.scoring.q_scale import kl_per_token
from mara_integrations.training.scoring.scale import report_scale

_HELD_OUT_SEED, _ROUND_SEED = 500_000, 1_000_000  # offsets larger than any number of replies
_OFFENDING_SHARE = 10  # positions with an offence are repeated until they are one in so many


@dataclass(frozen=True, slots=True)
class LabelledCandidates(Rows):
    """Positions, and which of their candidates break the rule.

    Attributes:
        positions: P positions.
        offends: Shape (P, K), bool.
    """

    positions: Positions
    offends: Tensor

    @classmethod
    def join(cls, parts: Sequence[LabelledCandidates]) -> LabelledCandidates:
        """All positions of the parts, in order."""
        return cls(Positions.join([part.positions for part in parts]), join_columns([part.offends for part in parts]))

    @property
    def wanted(self) -> Wanted:
        """The base model's choice among the candidates that keep to the rule."""
        return Wanted(self.positions, compliant(self.positions.log_probs, self.offends))


def train(run: Run, head: MARAHead) -> MethodResult:
    """Fit q to base replies, then to what the gated model still gets wrong.

    It does not use the replies of the data: the demo reaches the same figures without them.
    """
    assert isinstance(head, QHead)
    rule, seed = run.plan.rule, run.config.seed
    assert rule is not None
    prompts = limited_prompts(run, run.plan.train)
    held_out_prompts = limited_prompts(run, run.plan.held_out)
    per_prompt = min(2, replies_per_prompt(run))
    untrained = run.new_head().eval()
    base = generate_replies(run, "base replies", prompts, per_prompt, seed, untrained, is_base=True)
    held_out_base = generate_replies(
        run, "held-out base replies", held_out_prompts, per_prompt, seed + _HELD_OUT_SEED, untrained, is_base=True
    )
    check_violations(run, rule, base)
    sides = [[label_candidates(run.model, replies, Positions.of(replies), rule)] for replies in (base, held_out_base)]
    for number in range(run.config.correction_rounds + 1):
        fit_rule(run, f"fit {number + 1}", head, *(LabelledCandidates.join(side) for side in sides))
        if number == run.config.correction_rounds:
            break
        round_seed = seed + _ROUND_SEED * (number + 1)
        for temperature in (1.0, 0.0):
            stage = f"{'sampled' if temperature else 'greedy'} gated replies {number + 1}"
            gated = generate_replies(run, stage, prompts, 1, round_seed, head, temperature=temperature)
            report_correction(run, stage, rule, gated)
            sides[0].append(label_candidates(run.model, gated, Positions.of(gated), rule))
        held_out = generate_replies(
            run, f"held-out gated replies {number + 1}", held_out_prompts, 1, round_seed + _HELD_OUT_SEED, head
        )
        sides[1].append(label_candidates(run.model, held_out, Positions.of(held_out), rule))
    gated = generate_replies(run, "held-out gated replies", held_out_prompts, per_prompt, seed + _HELD_OUT_SEED, head)
    report_damage(run, rule, held_out_base, gated)
    return MethodResult(kl_per_token=_reported_kl(run, head, gated) if run.kl_budget is None else None)


def work(run: Run) -> Workload:
    """Return what `train` will do."""
    per_prompt, rounds, seed = min(2, replies_per_prompt(run)), run.config.correction_rounds, run.config.seed
    prompts, held_out = (limited_prompts(run, data) for data in (run.plan.train, run.plan.held_out))
    generations = [
        Generation(prompts, per_prompt, seed, is_gated=True, is_base=True),
        Generation(held_out, per_prompt, seed + _HELD_OUT_SEED, is_gated=True, is_base=True),
    ]
    known = sum(map(len, generations))
    added = 2 * len(prompts) + len(held_out)
    for _ in range(rounds):
        generations += [Generation(prompts, is_gated=True, temperature=t) for t in (1.0, 0.0)]
        generations.append(Generation(held_out, is_gated=True))
    generations.append(Generation(held_out, per_prompt, is_gated=True))  # which show the damage
    return Workload(generations, fitted=sum(known + number * added for number in range(rounds + 1)))


def fit_rule(run: Run, name: str, head: QHead, train: LabelledCandidates, held_out: LabelledCandidates) -> None:
    """Fit q to labelled candidates, starting from the head as it is.

    Rare offences are repeated, so that every minibatch holds some.
    """
    offending = train.offends.any(-1).nonzero()[:, 0]
    wanted = len(train) // _OFFENDING_SHARE
    if 0 < len(offending) < wanted:
        repeated = offending.repeat(wanted // len(offending))
        train = train.take(torch.cat([torch.arange(len(train)), repeated]))
    fit_wanted(run, name, head, train.wanted, held_out.wanted)


def label_candidates(
    model: LoadedModel, replies: Sequence[Reply], positions: Positions, rule: Rule
) -> LabelledCandidates:
    """Label each candidate by whether the text with it has more violations than the text before it."""
    offends = torch.zeros(positions.token_ids.shape, dtype=torch.bool)
    rows = zip(positions.replies.tolist(), positions.places.tolist(), strict=True)
    for row, (index, place) in enumerate(rows):
        before = replies[index].token_ids[:place]
        num_before = len(rule.violations(token_texts(model, before, last=1)[0])) if before else 0
        for column in positions.live[row].nonzero()[:, 0].tolist():
            text = token_texts(model, [*before, int(positions.token_ids[row, column])], last=1)[0]
            offends[row, column] = len(rule.violations(text)) > num_before
    return LabelledCandidates(positions, offends)


def _reported_kl(run: Run, head: QHead, gated: Sequence[Reply]) -> float:
    """Return KL(gate || base) on replies of the gate, in nats a token, and report it."""
    positions = Positions.of(gated)
    scores = all_scores(head, positions, run.backend.output_embeddings)
    kl = kl_per_token(positions, scores, head.config.scale)
    report_scale(run, head.config.scale, kl)
    return kl


def report_correction(run: Run, stage: str, rule: Rule, replies: Sequence[Reply]) -> None:
    """Log and say how many gated replies break the rule."""
    count = count_violating(rule, replies)
    run.log("correction", stage=stage, replies=len(replies), violations=count)
    run.say(f"  {count} of {len(replies)} {stage} break the rule")


def report_damage(run: Run, rule: Rule, base: Sequence[Reply], gated: Sequence[Reply]) -> None:
    """Log and say how many of the base model's replies that kept to the rule are not as they were.

    Both sides draw the same random numbers.
    """
    fine = [(b, g) for b, g in zip(base, gated, strict=True) if not rule.violations(b.text)]
    changed = sum(b.token_ids != g.token_ids for b, g in fine)
    kept = sum(not rule.violations(reply.text) for reply in gated)
    run.log("damage", fine=len(fine), changed=changed, kept=kept, replies=len(gated))
    run.say(
        f"  held-out prompts: {len(fine)} of {len(base)} base replies keep to the rule, {kept} gated ones; of those "
        f"{len(fine)} that were fine, {changed} changed"
    )
