"""What every stage of one training run shares: its settings, its plan, the loaded model, its folder and its log."""

from __future__ import annotations

import hashlib
import json
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
from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.head import MARAHead
from mara_integrations.models.load import LoadedModel
from mara_integrations.progress import Reporter
from mara_integrations.rewards import Reward, reward_spec
from mara_integrations.sampling import SamplingParams
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.learning.fit import Epoch, FitSettings
from mara_integrations.training.plan import Plan
from mara_integrations.training.records.metrics_log import MetricsLog
from mara_integrations.training.rollouts.writers import Writers

WORK_FOLDER = ".run"


@dataclass(frozen=True, slots=True)
class Learned:
    """What a method's loop says of its work, beside the head it fitted.

    Attributes:
        held_out_accuracy: Share of held-out pairs of better and worse replies that it orders rightly; None where there
            are none.
        rewards: Rewards that came of it, by name, for the final evaluation to judge by.
        kl_per_token: KL(gate || base) on held-out replies of the gate, where the method has set the scale itself.
    """

    held_out_accuracy: Interval | None = None
    rewards: Mapping[str, Reward] = field(default_factory=dict)
    kl_per_token: float | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One training run.

    Attributes:
        config: What the user said.
        plan: What follows from it.
        model: The base model.
        backend: On that model.
        model_fingerprint: Of the model's weights, see `keeping.model_fingerprint`.
        writers: Write replies.
        reporter: Hears the news.
        metrics: Figures of the run.
    """

    config: TrainConfig
    plan: Plan
    model: LoadedModel
    backend: Backend
    model_fingerprint: str
    writers: Writers
    reporter: Reporter
    metrics: MetricsLog

    # --- news ---

    def say(self, line: str) -> None:
        """One line of news, with rich's markup."""
        self.reporter.say(line)

    def stage(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A part of the work with `total` steps; gives a function to call with the number of steps just done."""
        return self.reporter.stage(name, total)

    def log(self, event: str, **values: Any) -> None:
        """Add a line to metrics.jsonl, for the trackers too."""
        self.metrics.log(event, values)

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Start metrics.jsonl and the trackers, or go on with those of an interrupted run; see `MetricsLog.opened`."""
        method, settings = self.plan.method.name, self.config.described()
        start = {"method": method, "model": self.model.name, "config": settings}
        with self.metrics.opened(self.folder.name, self.config.track, start):
            yield

    # --- what is kept until the head is finished ---

    @property
    def folder(self) -> Path:
        """Where an interrupted run finds what it had; other settings, data or another model have another folder."""
        parts = [
            self.config.described(),
            self.plan.fingerprint,
            self.model_fingerprint,
        ]
        fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        return self.config.output / WORK_FOLDER / fingerprint

    def forget(self) -> None:
        """Remove what was kept for an interruption."""
        shutil.rmtree(self.config.output / WORK_FOLDER, ignore_errors=True)

    # --- what methods build on ---

    def new_head(self) -> MARAHead:
        """An untrained head of the method's form on the model's device, as the settings have it."""
        config, plan = self.config, self.plan
        settings = HeadConfig(
            form=plan.method.form,
            hidden_size=self.model.hidden_size,
            inner_sizes=(config.inner_size, max(1, config.inner_size // 4)),
            base_model=self.model.name,
            base_model_fingerprint=self.model.fingerprint,
            top_k=config.top_k,
            top_p=config.top_p,
            min_candidates=config.min_candidates or plan.method.min_candidates,
            system_prompt=config.system_prompt,
            method=plan.method.name,
            rewards=tuple(reward_spec(reward) for reward in (plan.rule, plan.reward) if reward is not None),
            data_fingerprint=plan.train.fingerprint,
            training=config.described(),
        )
        return MARAHead(settings).to(self.model.device)

    @property
    def max_replies(self) -> int:
        """Replies to write in all."""
        return self.config.max_replies or self.plan.method.max_replies

    def sampling(self, **values: Any) -> SamplingParams:
        """How the model writes replies to learn from, with some values changed."""
        c = self.config
        settings = {"max_new_tokens": c.max_reply_tokens, "temperature": 1.0, "top_k": c.top_k, "top_p": c.top_p}
        return SamplingParams.of(**{**settings, **values})

    def random(self) -> random.Random:
        """The run's choice among prompts: the same each time it is asked for."""
        return random.Random(self.config.seed)

    def fit_settings(self, learning_rate: float) -> FitSettings:
        """How heads are fitted; `learning_rate` where the settings name none."""
        c = self.config
        return FitSettings(c.epochs, c.patience, c.learning_rate or learning_rate, c.weight_decay, c.batch_size, c.seed)

    @contextmanager
    def fitting(self, name: str) -> Iterator[Callable[[Epoch], None]]:
        """A stage whose steps are the epochs of a fit, each logged."""
        losses: list[float] = []
        with self.stage(name, self.config.epochs) as advance:

            def on_epoch(epoch: Epoch) -> None:
                losses.append(epoch.held_out_loss)
                self.log(name, **asdict(epoch))
                advance(int(epoch.epoch > 0))

            yield on_epoch
        count = f"after {len(losses) - 1} epochs"
        self.say(f"  {escape(name)}: held-out loss {losses[0]:.3f} -> {min(losses):.3f} {count}")
