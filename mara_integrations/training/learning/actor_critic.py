"""The paper's discrete soft actor-critic on a head: critics, temperature, one update.

The state is a candidate's hidden state, the action is to accept or reject it. A rejection leads to the next candidate
of the position, an acceptance to the first candidate of the next position.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, mse_loss

from mara_integrations.engine.gate import accept_logit
from mara_integrations.heads.afterstate import AfterstateHead
from mara_integrations.sampling import HeadForm
from mara_integrations.training.learning.objectives import decision_kl
from mara_integrations.training.learning.replay_buffer import Batch, Transitions

Credit = Literal["terminal", "postback", "prefix"]


@dataclass(frozen=True, slots=True)
class SACSettings:
    """Settings of soft actor-critic. The defaults are those that work in small runs, not those of the paper's code.

    Flags and files named here are those of the paper's code.

    Attributes:
        learning_rate: Learning rate of head, critics and temperature (`--lr_*`).
        batch_size: Transitions an update (`--batch_size`).
        updates: Updates a reply (`--update_time`).
        warmup: Number of transitions before the first update; 64 batches in distri_executor.py.
        capacity: Number of transitions the replay buffer keeps (`--buffer_capacity`).
        gamma: Discount a decision (`--gamma`).
        tau: Share of the critics that their targets take over (`--replace_tau`).
        target_every: Updates between two moves of the targets. SAC.py moves them after all updates of a reply.
        temperature: Initial weight of the entropy (`--alpha`). With one reward a reply, 0.01 let small runs end in
            rejecting everything; where each token has its own reward, 0.2 drowned it.
        target_entropy: Entropy of a decision, in nats, that the temperature is adapted to (`--target_entropy_factor`
            times ln 2); None leaves the temperature as it is.
        max_grad_norm: Norm that gradients of head and critics are clipped to (`--max_grad_norm`).
        credit: Which decisions get a reply's reward: its last one (`terminal`), every one (`postback`,
            `--postback_reward 1`, which makes long replies worth more), or each the rise of the reward at its token
            (`prefix`).
        kl_weight: Weight of the KL of each decision from the base model's (`--kl_ctl`).
        include_forced: Count the last candidate, which is taken without asking the head, as accepted (llm_env.py).
        standardise: Divide rewards by their standard deviation in the first round, so that a weight means the same with
            every reward. Where the reward is not spread over the text, subtract its mean too.
    """

    learning_rate: float = 3e-4
    batch_size: int = 256
    updates: int = 4
    warmup: int = 1024
    capacity: int = 1_000_000
    gamma: float = 0.95
    tau: float = 0.02
    target_every: int = 1
    temperature: float = 0.03
    target_entropy: float | None = 0.6 * math.log(2)
    max_grad_norm: float = 0.5
    credit: Credit = "prefix"
    kl_weight: float = 0.1
    include_forced: bool = False
    standardise: bool = True


def default_settings(form: HeadForm, credit: Credit = "prefix") -> SACSettings:
    """Return the settings for a form of head and a way to assign credit.

    One reward a reply has to reach back over all of it, and needs more entropy to be found. A `residual` head starts as
    the base model: the KL from it keeps the decisions open, and no entropy is needed.
    """
    settings = SACSettings(credit=credit)
    if credit != "prefix":
        settings = replace(settings, gamma=0.99, temperature=0.2)
    return settings if form == "paper" else replace(settings, temperature=0.0, target_entropy=None)


class Critics(nn.Module):
    """Two estimates of the value of rejecting and of accepting a candidate, on one LayerNorm, sizes as in the head."""

    def __init__(self, hidden_size: int, inner_sizes: tuple[int, int]) -> None:
        super().__init__()
        wide, narrow = inner_sizes
        self.ln = nn.LayerNorm(hidden_size)
        self.first, self.second = (
            nn.Sequential(
                nn.Linear(hidden_size, wide), nn.ReLU(), nn.Linear(wide, narrow), nn.ReLU(), nn.Linear(narrow, 2)
            )
            for _ in range(2)
        )

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return both estimates for the actions reject and accept: (B, d) to (B, 2) twice."""
        x = self.ln(states)
        return self.first(x), self.second(x)


@dataclass(frozen=True, slots=True)
class DecisionStats:
    """Means over decisions.

    Attributes:
        accept_rate: Accept probability.
        entropy: Entropy, in nats.
        kl: KL from the base model's decision, in nats.
    """

    accept_rate: float
    entropy: float
    kl: float


def policy(actor: AfterstateHead, states: Tensor, hazard_logits: Tensor) -> Tensor:
    """Return the log-probabilities of rejecting and of accepting, (B, 2)."""
    z = accept_logit(actor.config.form, actor.score(states, states), hazard_logits, 1.0)
    return torch.stack([logsigmoid(-z), logsigmoid(z)], dim=-1)


@torch.inference_mode()
def decision_stats(actor: AfterstateHead, transitions: Transitions) -> DecisionStats:
    """Return how a head decides in the states of transitions."""
    device = actor.device
    states, hazard_logits = transitions.states.to(device).float(), transitions.hazard_logits.to(device)
    log_probs = policy(actor, states, hazard_logits)  # (N, 2)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    kl = decision_kl(log_probs[:, 1] - log_probs[:, 0], hazard_logits)
    return DecisionStats(float(log_probs[:, 1].exp().mean()), float(entropy.mean()), float(kl.mean()))


class Learner:
    """Head, critics, target critics and temperature, with their optimizers.

    Args:
        actor: The head, updated in place.
        settings: Settings of the updates.
        seed: Seed of the critics' first weights and of the batches drawn.
    """

    def __init__(self, actor: AfterstateHead, settings: SACSettings, seed: int) -> None:
        self.actor, self.settings = actor.requires_grad_(True), settings
        self.device = actor.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            critics = Critics(actor.config.hidden_size, actor.config.inner_sizes)
        self.critics = critics.to(self.device)
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        first = math.log(settings.temperature) if settings.temperature > 0 else -math.inf
        self.log_alpha = torch.tensor(first, device=self.device, requires_grad=True)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), settings.learning_rate)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), settings.learning_rate)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], settings.learning_rate)
        self.generator = torch.Generator().manual_seed(seed)
        self.num_updates = 0

    def soft_value(self, log_probs: Tensor, q: Tensor, hazard_logits: Tensor) -> Tensor:
        """Return the value of states, plus the weighted entropy, less the weighted KL from the base model, (B,)."""
        value = q - self.log_alpha.detach().exp() * log_probs
        if self.settings.kl_weight:
            base = torch.stack([logsigmoid(-hazard_logits), logsigmoid(hazard_logits)], dim=-1)
            value = value - self.settings.kl_weight * (log_probs - base)
        return (log_probs.exp() * value).sum(-1)

    def update(self, batch: Batch) -> dict[str, float]:
        """Take one step of critics, head, temperature and, when it is their turn, targets; return metrics of it.

        Source: Christodoulou 2019 (arXiv 1910.07207), discrete soft actor-critic; SAC.py, `update`.
        """
        s = self.settings
        with torch.no_grad():
            q_next = torch.minimum(*self.targets(batch.next_states))
            log_probs = policy(self.actor, batch.next_states, batch.next_hazard_logits)
            value_next = self.soft_value(log_probs, q_next, batch.next_hazard_logits)
            target_q = batch.rewards + s.gamma * torch.where(batch.ends, 0.0, value_next)
        taken = batch.accepted.long()[:, None]
        q1, q2 = (q.gather(1, taken)[:, 0] for q in self.critics(batch.states))
        critic_loss = 0.5 * (mse_loss(q1, target_q) + mse_loss(q2, target_q))
        _step(self.critic_optimizer, critic_loss, self.critics, s.max_grad_norm)

        with torch.no_grad():
            q = torch.minimum(*self.critics(batch.states))
        log_probs = policy(self.actor, batch.states, batch.hazard_logits)
        actor_loss = -self.soft_value(log_probs, q, batch.hazard_logits).mean()
        _step(self.actor_optimizer, actor_loss, self.actor, s.max_grad_norm)

        entropy = -(log_probs.exp() * log_probs).sum(-1).detach()
        if s.target_entropy is not None:
            alpha_loss = (entropy - s.target_entropy).mean() * self.log_alpha.exp()
            self.alpha_optimizer.zero_grad(set_to_none=True)
            alpha_loss.backward()
            self.alpha_optimizer.step()
        self.num_updates += 1
        if self.num_updates % s.target_every == 0:
            for target, source in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
                target.lerp_(source.detach(), s.tau)
        metrics = {"critic_loss": critic_loss, "actor_loss": actor_loss, "entropy": entropy.mean(), "q": q.mean()}
        metrics["alpha"] = self.log_alpha.exp()
        return {name: float(value.detach()) for name, value in metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs to continue bit for bit, except the replay buffer."""
        return {
            "num_updates": self.num_updates,
            "generator": self.generator.get_state(),
            "log_alpha": self.log_alpha.detach(),
            **{name: part.state_dict() for name, part in self._parts().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.num_updates = state["num_updates"]
        self.generator.set_state(state["generator"])
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        names = ("actor", "critics", "targets", "actor_optimizer", "critic_optimizer", "alpha_optimizer")
        return {name: getattr(self, name) for name in names}


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, module: nn.Module, max_grad_norm: float) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
    optimizer.step()


def collapse(stats: DecisionStats) -> str | None:
    """Return what is wrong with a head that decides all candidates alike; None where it does not."""
    accept_rate, entropy = stats.accept_rate, stats.entropy
    if not (math.isfinite(accept_rate) and math.isfinite(entropy)):
        return "its scores are no longer numbers"
    if entropy > 0.02:
        return None
    if accept_rate < 0.1:
        return f"it rejects everything (accept probability {accept_rate:.3f}, entropy {entropy:.3f} nats)"
    if accept_rate > 0.99:
        return f"it accepts everything (accept probability {accept_rate:.3f}, entropy {entropy:.3f} nats)"
    return None
