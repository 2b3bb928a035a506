"""Measure how far two engines lie apart on one reply: what a quantisation, or another number format, changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mara_integrations.engine.oracle.reference import AnyModel, recompute


@dataclass(frozen=True, slots=True)
class Drift:
    """Differences of one engine's numbers from another's, over the positions of a reply.

    Attributes:
        num_tokens: Positions compared.
        states: Mean distance of the hidden states, as a share of the other's size.
        log_probs: Mean distance of the log-probabilities of the reply's tokens, in nats.
        same_best: Share of positions where both hold the same token for the most probable one.
    """

    num_tokens: int
    states: float
    log_probs: float
    same_best: float


@torch.inference_mode()
def drift(ours: AnyModel, theirs: AnyModel, prompt_ids: Sequence[int], reply_ids: Sequence[int]) -> Drift:
    """Feed a prompt and a reply to two models, every position computed anew, and compare their numbers.

    Args:
        ours: One model.
        theirs: Another, with the same vocabulary.
        prompt_ids: Tokens of the prompt.
        reply_ids: At least one token.
    """
    states, log_probs, same = [], [], []
    for place, token_id in enumerate(reply_ids):
        context = [*prompt_ids, *reply_ids[:place]]
        (our_state, our_logits), (their_state, their_logits) = (recompute(model, context) for model in (ours, theirs))
        our_state, their_state = our_state.float().cpu(), their_state.float().cpu()
        states.append(float((our_state - their_state).norm() / their_state.norm()))
        ours_now, theirs_now = (logits.float().cpu().log_softmax(-1) for logits in (our_logits, their_logits))
        log_probs.append(abs(float(ours_now[token_id] - theirs_now[token_id])))
        same.append(float(ours_now.argmax() == theirs_now.argmax()))
    count = len(reply_ids)
    return Drift(count, sum(states) / count, sum(log_probs) / count, sum(same) / count)
