"""The paper's discrete soft actor-critic on a head: critics, temperature, one update. Knows no model and no text.

State: a candidate's hidden state. Action: accept or reject. A rejection leads to the next candidate of the position, an
acceptance to the first one of the next.
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
    """What the paper's code fixes by its scripts, and where it can be otherwise; the defaults are the mended ones.

    Flags and files named are those of the paper's code.

    Attributes:
        learning_rate: Of head, critics and temperature (`--lr_*`).
        batch_size: Transitions an update (`--batch_size`).
        updates: An episode (`--update_time`).
        warmup: Transitions before the first update; 64 batches in distri_executor.py.
        capacity: Transitions kept (`--buffer_capacity`).
        gamma: Discount a decision (`--gamma`).
        tau: Share of the critics their targets take over (`--replace_tau`).
        target_every: Updates between two moves of the targets. SAC.py moves them after an episode's updates, not after
            each.
        temperature: First weight of the entropy (`--alpha`). With a worth that comes once a reply, 0.01 let small runs
            end in rejecting everything; where each token has its own, 0.2 drowned it.
        target_entropy: Of a decision, in nats, for the temperature to be learned (`--target_entropy_factor` ln 2); None
            leaves the temperature as it is.
        max_grad_norm: Gradients of head and critics are clipped to it (`--max_grad_norm`).
        credit: Who gets a reply's worth: its last decision (`terminal`), every one (`postback`, `--postback_reward 1`,
            a value of some T gamma^T R and so a bias by length), or each what the text gained by it (`prefix`).
        kl_weight: Of the distance from the base model (`--kl_ctl`).
        kl: Of each decision, exact and under the head as it is now; or, as published, a part of the reward.
        last_is_asked: The last candidate, which is taken whatever the head says, is stored as accepted (llm_env.py).
        spare_first: The first decision gets nothing of what is posted back (distri_executor.py).
        standardise: Divide worths by their standard deviation in the first round, so that a weight means the same with
            every reward; where they are not spread over the text, take their mean off before.
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
    kl: Literal["exact", "published"] = "exact"
    last_is_asked: bool = False
    spare_first: bool = False
    standardise: bool = True


def mended(form: HeadForm, credit: Credit = "prefix") -> SACSettings:
    """The preset for a form of head and a way to credit.

    A worth that comes once a reply has to reach back over all of it, and needs more entropy to be found. From a head
    that is the base model, the distance from it holds the decisions open by itself, and no entropy is needed.
    """
    settings = SACSettings(credit=credit)
    if credit != "prefix":
        settings = replace(settings, gamma=0.99, temperature=0.2)
    return settings if form == "paper" else replace(settings, temperature=0.0, target_entropy=None)


PUBLISHED = SACSettings(
    batch_size=1024,
    updates=10,
    warmup=64 * 1024,
    gamma=0.99,
    tau=0.005,
    target_every=10,
    temperature=0.01,
    credit="postback",
    kl="published",
    last_is_asked=True,
    spare_first=True,
    standardise=False,
)


class Critics(nn.Module):
    """Two estimates of what rejecting and accepting a candidate is worth, on one LayerNorm, sizes as in the head."""

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
        """Both estimates of each action, reject and accept: (B, d) to (B, 2) twice."""
        x = self.ln(states)
        return self.first(x), self.second(x)


@dataclass(frozen=True, slots=True)
class Vitals:
    """Means over decisions.

    Attributes:
        accept_rate: Accept probability.
        entropy: In nats.
        kl: From the base model's decision, in nats.
    """

    accept_rate: float
    entropy: float
    kl: float


def policy(actor: AfterstateHead, states: Tensor, hazard_logits: Tensor) -> Tensor:
    """Log-probability of rejecting and of accepting, (B, 2)."""
    z = accept_logit(actor.config.form, actor.score(states, states), hazard_logits, 1.0)
    return torch.stack([logsigmoid(-z), logsigmoid(z)], dim=-1)


@torch.inference_mode()
def vitals_of(actor: AfterstateHead, transitions: Transitions) -> Vitals:
    """How a head decides in the states of transitions."""
    device = actor.device
    states, hazard_logits = transitions.states.to(device).float(), transitions.hazard_logits.to(device)
    log_probs = policy(actor, states, hazard_logits)  # (N, 2)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    kl = decision_kl(log_probs[:, 1] - log_probs[:, 0], hazard_logits)
    return Vitals(float(log_probs[:, 1].exp().mean()), float(entropy.mean()), float(kl.mean()))


class Learner:
    """Head, critics, their targets and the temperature, with their optimizers.

    Args:
        actor: The head, updated in place.
        settings: How it learns.
        seed: Of the critics' first weights and of the batches drawn.
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
        """Expected worth of a state, with what the entropy adds and the distance from the base model costs, (B,)."""
        value = q - self.log_alpha.detach().exp() * log_probs
        if self.settings.kl == "exact":
            base = torch.stack([logsigmoid(-hazard_logits), logsigmoid(hazard_logits)], dim=-1)
            value = value - self.settings.kl_weight * (log_probs - base)
        return (log_probs.exp() * value).sum(-1)

    def update(self, batch: Batch) -> dict[str, float]:
        """One step of critics, head, temperature and, when it is their turn, targets; returns figures of it.

        Source: Christodoulou 2019 (arXiv 1910.07207), discrete soft actor-critic; SAC.py, `update`.
        """
        s = self.settings
        with torch.no_grad():
            q_next = torch.minimum(*self.targets(batch.next_states))
            log_probs = policy(self.actor, batch.next_states, batch.next_hazard_logits)
            value_next = self.soft_value(log_probs, q_next, batch.next_hazard_logits)
            wanted = batch.rewards + s.gamma * torch.where(batch.ends, 0.0, value_next)
        taken = batch.accepted.long()[:, None]
        q1, q2 = (q.gather(1, taken)[:, 0] for q in self.critics(batch.states))
        critic_loss = 0.5 * (mse_loss(q1, wanted) + mse_loss(q2, wanted))
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
        figures = {"critic_loss": critic_loss, "actor_loss": actor_loss, "entropy": entropy.mean(), "q": q.mean()}
        figures["alpha"] = self.log_alpha.exp()
        return {name: float(value.detach()) for name, value in figures.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that an interrupted run needs to go on as if nothing had been; the buffer apart."""
        return {
            "num_updates": self.num_updates,
            "generator": self.generator.get_state(),
            "log_alpha": self.log_alpha.detach(),
            **{name: part.state_dict() for name, part in self._parts().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
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


def collapse(vitals: Vitals) -> str | None:
    """What is wrong with a head that has stopped deciding, None while it does."""
    accept_rate, entropy = vitals.accept_rate, vitals.entropy
    if not (math.isfinite(accept_rate) and math.isfinite(entropy)):
        return "its scores are no longer numbers"
    if entropy > 0.02:
        return None
    if accept_rate < 0.1:
        return f"it rejects everything (accept probability {accept_rate:.3f}, entropy {entropy:.3f} nats)"
    if accept_rate > 0.99:
        return f"it accepts everything (accept probability {accept_rate:.3f}, entropy {entropy:.3f} nats)"
    return None
