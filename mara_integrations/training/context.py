"""The state that all stages of one training run share: settings, plan, model, output folder and log."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape

from mara_integrations.engine.backends.protocol import Backend
from mara_integrations.evaluation.metrics import Interval
from mara_integrations.heads.head import HeadConfig, MARAHead
from mara_integrations.models.load import LoadedModel
from mara_integrations.progress import Reporter
from mara_integrations.rewards import Reward, reward_spec
from mara_integrations.sampling import SamplingParams
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.identity import Identity
from mara_integrations.training.learning.fit import Epoch, FitSettings
from mara_integrations.training.plan import Plan
from mara_integrations.training.records.metrics_log import MetricsLog
from mara_integrations.training.rollouts.workers import RolloutWorkers
from mara_integrations.training.teachers import Role, Teacher

WORK_FOLDER = ".run"  # in the output folder, until the head is finished
FAILURE_FILE = "reward-failure.json"


@dataclass(frozen=True, slots=True)
class MethodResult:
    """What a training method returns beside the head it fitted in place.

    Attributes:
        held_out_accuracy: Share of held-out pairs of a better and a worse reply that the head orders correctly; None
            where there are none.
        rewards: Rewards that were fitted for the method, by name; the final evaluation uses them.
        kl_per_token: KL(gate || base) on held-out replies of the gate, in nats a token, where the method has calibrated
            the head's scale itself; else None.
        metrics: Further figures for the head's config, as JSON values.
    """

    held_out_accuracy: Interval | None = None
    rewards: Mapping[str, Reward] = field(default_factory=dict)
    kl_per_token: float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """One training run.

    Attributes:
        config: Settings of the user.
        plan: Data, reward and method that follow from them.
        identity: What decides the head.
        model: The base model.
        backend: A backend on the model.
        workers: Rollout workers, which generate replies.
        reporter: Receives lines of text and progress.
        metrics: Log of the run's metrics.
        teachers: Models that read replies beside the base model, by their role.
    """

    config: TrainConfig
    plan: Plan
    identity: Identity
    model: LoadedModel
    backend: Backend
    workers: RolloutWorkers
    reporter: Reporter
    metrics: MetricsLog
    teachers: Mapping[Role, Teacher] = field(default_factory=dict)

    # --- text, progress, metrics ---

    def say(self, line: str) -> None:
        """Report one line of text, with rich's markup."""
        self.reporter.say(line)

    def stage(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show the progress of a stage; the context is a function that takes the number of steps just done."""
        return self.reporter.stage(name, total)

    def log(self, event: str, **values: Any) -> None:
        """Add a line to metrics.jsonl and to the trackers."""
        self.metrics.log(event, values)

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Start metrics.jsonl and the trackers, or continue those of an interrupted run; see `MetricsLog.opened`."""
        self.identity.write(self.folder)
        start = {"method": self.plan.method.name, "model": self.model.name, "config": self.config.described()}
        with self.metrics.opened(self.folder.name, self.config.track, start):
            yield

    # --- stored work ---

    @property
    def folder(self) -> Path:
        """Folder of this run's stored work; a run of another identity has another folder."""
        return self.config.output / WORK_FOLDER / self.identity.fingerprint

    def stored(self, name: str, part: int | None = None) -> Path:
        """Return the file of some stored work, by the name of its stage."""
        return self.folder / f"{name.replace(' ', '-')}{'' if part is None else f'-{part}'}.pt"

    def finish(self) -> None:
        """Remove stored work, also that of earlier runs into the same folder, and what a failed reward left."""
        shutil.rmtree(self.config.output / WORK_FOLDER, ignore_errors=True)
        (self.config.output / FAILURE_FILE).unlink(missing_ok=True)

    # --- settings of stages ---

    def new_head(self) -> MARAHead:
        """Return an untrained head of the method's form, on the model's device."""
        config, plan = self.config, self.plan
        size = config.inner_size
        sizes: dict[str, Any] = {} if size is None else {"inner_sizes": (size, max(1, size // 4))}
        settings = HeadConfig(
            form=plan.method.form,
            hidden_size=self.model.hidden_size,
            **sizes,
            base_model=self.model.name,
            base_model_fingerprint=self.model.fingerprint,
            top_k=config.top_k,
            top_p=config.top_p,
            min_candidates=config.min_candidates or plan.method.min_candidates,
            system_prompt=config.system_prompt,
            method=plan.method.name,
            rewards=tuple(reward_spec(reward) for reward in (plan.rule, plan.reward) if reward is not None),
            principle=None if plan.principle is None or plan.source == "documents" else plan.principle.described,
            against=plan.principle.against if plan.principle and config.principle_contrast != "neutral" else None,
            teacher=None if "teacher" not in self.teachers else self.teachers["teacher"].name,
            teacher_base=None if "teacher_base" not in self.teachers else self.teachers["teacher_base"].name,
            data_fingerprint=plan.data_fingerprint,
            origin=self.identity.origin(config, plan),
            training=config.described(),
        )
        return MARAHead(settings).to(self.model.device)

    @property
    def max_replies(self) -> int:
        """Number of replies to generate in all."""
        return self.config.max_replies or self.plan.method.max_replies

    @property
    def kl_budget(self) -> float | None:
        """Bound on the KL from the base model, in nats a token; None is no bound."""
        return self.config.kl_budget or self.plan.method.kl_budget

    def sampling(self, **changes: Any) -> SamplingParams:
        """Return the sampling settings of replies to learn from, with some changes."""
        c = self.config
        settings = {"max_new_tokens": c.max_reply_tokens, "temperature": 1.0, "top_k": c.top_k, "top_p": c.top_p}
        return SamplingParams.of(**{**settings, **changes})

    def random(self) -> random.Random:
        """Return a generator for choices among prompts; each call returns one in the same state."""
        return random.Random(self.config.seed)

    def fit_settings(self, learning_rate: float) -> FitSettings:
        """Return the settings of a fit; `learning_rate` is the default of that setting."""
        c = self.config
        return FitSettings(c.epochs, c.patience, c.learning_rate or learning_rate, c.weight_decay, c.batch_size, c.seed)

    @contextmanager
    def fitting(self, name: str) -> Iterator[Callable[[Epoch], None]]:
        """Show the progress of a fit and log its epochs; the context is the function to call after each epoch."""
        losses: list[float] = []
        with self.stage(name, self.config.epochs) as advance:

            def on_epoch(epoch: Epoch) -> None:
                losses.append(epoch.held_out_loss)
                self.log(name, **asdict(epoch))
                advance(int(epoch.epoch > 0))

            yield on_epoch
        count = f"after {len(losses) - 1} epochs"
        self.say(f"  {escape(name)}: loss on held-out examples {losses[0]:.3f} -> {min(losses):.3f} {count}")
