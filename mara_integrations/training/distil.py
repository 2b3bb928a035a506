"""Distil a head of any form into a Q-head: the same gate, as far as it can be told before a candidate is fed.

The teacher writes replies with all candidates of every position fed, so that its distribution is known exactly. The
Q-head is fitted to that distribution from the state before the position, and compared with it on held-out prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mara_integrations.engine.backends.protocol import Backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.gate import accept_logit, gated_log_probs, weighted_log_probs
from mara_integrations.engine.scheduler import Scheduler
from mara_integrations.errors import ConfigError
from mara_integrations.heads.afterstate import AfterstateHead
from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.messages import Conversation
from mara_integrations.models.load import LoadedModel
from mara_integrations.progress import Reporter
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.training.learning.fit import FitSettings, Rows, fit
from mara_integrations.training.rollouts.positions import Embeddings, Positions, all_scores, q_scores
from mara_integrations.training.rollouts.replies import Reply, sample_replies

_HELD_OUT_SHARE = 0.2
_LIVE = 16  # replies written side by side: each feeds all candidates of its position


@dataclass(frozen=True, slots=True)
class DistilReport:
    """The gate of a Q-head beside that of its teacher, at the same positions of the teacher's held-out replies.

    Attributes:
        positions: Number of positions, those with a lone candidate left out.
        kl: KL(teacher || Q-head), in nats a position.
        base_kl: KL(teacher || base model), in nats a position: what there was to learn.
        greedy_agreement: Share of positions where both take the same token greedily.
        sampled_agreement: Share of positions where both draw the same token with the same random number.
    """

    positions: int
    kl: float
    base_kl: float
    greedy_agreement: float
    sampled_agreement: float


@dataclass(frozen=True, slots=True)
class TeacherPositions(Rows):
    """Positions, and the teacher's distribution over their candidates.

    Attributes:
        positions: P positions.
        log_probs: Log-probabilities under the teacher's gate, -inf where there is no candidate, (P, K).
    """

    positions: Positions
    log_probs: Tensor


def distil(
    teacher: MARAHead,
    model: LoadedModel,
    backend: Backend,
    prompts: Sequence[Conversation],
    *,
    max_reply_tokens: int = 24,
    settings: FitSettings | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> tuple[QHead, DistilReport]:
    """Fit a Q-head to the gate of another head.

    Args:
        teacher: A head of the `paper`, `residual` or `value` form, on the model's device.
        model: The base model.
        backend: A backend on it.
        prompts: Prompts that the teacher replies to; a fifth of them is held out.
        max_reply_tokens: Length of the replies; each token feeds all candidates of its position.
        settings: How the head is fitted; None is 30 epochs at most.
        seed: Seed of the replies and of the fit.
        reporter: Receives progress.

    Returns:
        The head, whose scale is 1, and how near it is to its teacher.

    Raises:
        ConfigError: If the teacher is a Q-head, or there are fewer than two prompts.
    """
    if not isinstance(teacher, AfterstateHead):
        raise ConfigError("the head is of the 'q' form already: there is nothing to distil")
    if len(prompts) < 2:
        raise ConfigError(f"{len(prompts)} prompts are too few", hint="at least 2, so that one is held out")
    config, reporter = teacher.config, reporter or Reporter()
    decoder = Decoder(backend, Scheduler(max_live=_LIVE, feeds_all=True))
    with reporter.stage("replies of the teacher", len(prompts)) as advance:
        replies = sample_replies(
            model,
            decoder,
            prompts,
            sampling=SamplingParams(
                max_new_tokens=max_reply_tokens,
                temperature=1.0,
                top_k=config.top_k,
                top_p=config.top_p,
                min_candidates=config.min_candidates,
            ),
            seed=seed,
            head=teacher,
            gate=GateParams(selection="sample"),
            keep_positions=True,
            on_reply=advance,
        )
    num_held_out = max(1, round(_HELD_OUT_SHARE * len(prompts)))
    train = teacher_positions(teacher, replies[num_held_out:])
    held_out = teacher_positions(teacher, replies[:num_held_out])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = QHead(
            HeadConfig(
                form="q",
                hidden_size=config.hidden_size,
                base_model=model.name,
                top_k=config.top_k,
                top_p=config.top_p,
                min_candidates=config.min_candidates,
                greedy_strength=config.greedy_strength,
                greedy_top_p=config.greedy_top_p,
                method="distil",
                rewards=config.rewards,
                data_fingerprint=config.data_fingerprint,
                training={"teacher": teacher.fingerprint, "method": config.method},
            )
        ).to(model.device)
    settings = settings or FitSettings(epochs=30, patience=4, learning_rate=1e-3, batch_size=256, seed=seed)
    embeddings = backend.output_embeddings
    with reporter.stage("fit", settings.epochs) as advance:

        def loss(head: MARAHead, part: TeacherPositions) -> Tensor:
            assert isinstance(head, QHead)
            return teacher_kl(head, part, embeddings).mean()

        fit(head, train, held_out, loss, settings, lambda epoch: advance(int(epoch.epoch > 0)))
    return head, compare(head, held_out, embeddings, seed)


@torch.inference_mode()
def teacher_positions(teacher: AfterstateHead, replies: Sequence[Reply]) -> TeacherPositions:
    """Return the positions of replies whose candidates were all fed, with the teacher's distribution."""
    positions = Positions.of(replies)
    z, row = torch.zeros(positions.token_ids.shape), 0
    for reply in replies:
        for position in reply.positions:
            count = len(position.token_ids)
            assert len(position.states) == count, "the teacher has seen every candidate"
            previous = position.previous.expand_as(position.states)
            factor = teacher.parts[teacher]
            scores = factor * teacher.score(position.states.float(), previous.float()).cpu()
            hazards = torch.tensor(position.hazard_logits)
            z[row, :count] = accept_logit(teacher.config.form, scores, hazards, 1.0)
            row += 1
    return TeacherPositions(positions, gated_log_probs(z, positions.live))


def teacher_kl(head: QHead, part: TeacherPositions, embeddings: Embeddings) -> Tensor:
    """KL(teacher || gate of the head) of each position, (P,), in nats."""
    where = part.positions
    scores = q_scores(head, where.states, where.token_ids, embeddings).cpu()
    gated = weighted_log_probs(where.log_probs, scores, 1.0, where.live)
    return _kl(part.log_probs, gated)


def compare(head: QHead, held_out: TeacherPositions, embeddings: Embeddings, seed: int) -> DistilReport:
    """Compare both gates at the same positions."""
    where = held_out.positions
    gated = weighted_log_probs(where.log_probs, all_scores(head, where, embeddings), 1.0, where.live)
    uniform = torch.rand(len(where), 1, generator=torch.Generator().manual_seed(seed))

    def drawn(log_probs: Tensor) -> Tensor:
        return (log_probs.exp().cumsum(-1) <= uniform).sum(-1).clamp(max=log_probs.shape[1] - 1)

    def agreement(take: Tensor, other: Tensor) -> float:
        return float((take == other).float().mean())

    return DistilReport(
        positions=len(where),
        kl=float(_kl(held_out.log_probs, gated).mean()),
        base_kl=float(_kl(held_out.log_probs, where.log_probs).mean()),
        greedy_agreement=agreement(held_out.log_probs.argmax(-1), gated.argmax(-1)),
        sampled_agreement=agreement(drawn(held_out.log_probs), drawn(gated)),
    )


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * torch.where(p.isfinite(), p - q, 0.0)).sum(-1)
