"""One training run, top to bottom: data, plan, replies and their states, fit, strength, head on disk, evaluation."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from mara_integrations.data import Dataset, Labelled, Pair, PromptRow, Row, gather_columns
from mara_integrations.engine.backend import make_backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.head import HeadConfig, MARAHead
from mara_integrations.engine.scheduler import Scheduler
from mara_integrations.errors import DataError
from mara_integrations.evaluation.evaluate import Evaluation, evaluate
from mara_integrations.evaluation.metrics import Interval, wilson
from mara_integrations.files import append_line
from mara_integrations.messages import Message
from mara_integrations.models import ModelSpec, load_model
from mara_integrations.progress import Reporter
from mara_integrations.rewards import reward_spec, score
from mara_integrations.runtime import MARAEngine
from mara_integrations.sampling import SamplingParams
from mara_integrations.training.bank import Reply, kept, read_replies, sample_replies
from mara_integrations.training.calibration import MAX_STRENGTH, score_positions, strength_for_budget
from mara_integrations.training.card import figures, model_card
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.fitting import Epoch, FitSettings
from mara_integrations.training.plan import make_plan
from mara_integrations.training.rule import fit_rule, rule_table
from mara_integrations.training.value import advantages, fit_value, reply_values

METRICS_FILE, BANK_FOLDER = "metrics.jsonl", ".bank"
_DEFAULT_KL_BUDGET = 0.15
_CALIBRATION_REPLIES, _CALIBRATION_TOKENS = 12, 16
_READ_PART = 256  # replies between two files of an interrupted run


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run leaves.

    Attributes:
        head: The head, as saved.
        output: Its folder.
        evaluation: On held-out prompts, base against gated; None where none was asked for.
        held_out_accuracy: Share of held-out pairs of better and worse replies that V orders rightly; None where there
            are none.
        kl_per_token: KL(gate || base) on the base model's replies, in nats a token.
    """

    head: MARAHead
    output: Path
    evaluation: Evaluation | None
    held_out_accuracy: Interval | None
    kl_per_token: float


def train(config: TrainConfig, reporter: Reporter | None = None) -> TrainResult:
    """Train a head; see `TrainConfig` for what can be said, `make_plan` for what is refused.

    Started again after an interruption with the same settings, it takes up the replies it had already gathered.

    Raises:
        MaraError: See `make_plan`, `load_model`, `rewards.score`.
    """
    return _Run(config, reporter or Reporter()).train()


class _Run:
    """State shared by the stages of one run."""

    def __init__(self, config: TrainConfig, reporter: Reporter) -> None:
        self.config, self.reporter = config, reporter
        self.plan = make_plan(config)
        self.started = time.monotonic()

    def train(self) -> TrainResult:
        """Everything, in order."""
        config, plan = self.config, self.plan
        self.reporter.say(f"[bold]Method[/] {plan.method}: {escape(plan.why)}")
        count = f"{len(plan.train.rows)} rows to fit on, {len(plan.held_out.rows)} held out, split by prompt"
        self.reporter.say(f"[bold]Data[/]   {escape(str(config.data))}: {count}")
        self.model = load_model(ModelSpec(config.model, device=config.device, dtype=config.dtype))
        self.decoder = Decoder(make_backend(self.model.model, self.model.name))
        self.reporter.say(
            f"[bold]Model[/]  {escape(self.model.name)} on {self.model.device}, {str(self.model.dtype)[6:]}"
        )
        self._try_reward()
        self.bank = config.output / BANK_FOLDER / self._fingerprint()
        self._begin_metrics()
        torch.manual_seed(config.seed)
        head = MARAHead(
            HeadConfig(
                form="value" if plan.method == "value" else "residual",
                hidden_size=self.model.hidden_size,
                inner_sizes=(config.inner_size, max(1, config.inner_size // 4)),
                base_model=self.model.name,
                top_k=config.top_k,
                top_p=config.top_p,
                min_candidates=config.min_candidates or (2 if plan.method == "rule" else 1),
                method=plan.method,
                rewards=tuple(reward_spec(reward) for reward in (plan.rule, plan.reward) if reward is not None),
                data_fingerprint=plan.train.fingerprint,
                training=config.described(),
            )
        ).to(self.model.device)
        accuracy = None
        if plan.method == "rule":
            self._fit_rule(head)
        else:
            accuracy = self._fit_value(head)
        strength, kl = self._calibrate(head)
        head.config = head.config.model_copy(update={"strength": strength})
        head.save_pretrained(config.output)  # before the evaluation, so that it is not lost with it
        evaluation = self._evaluate(head)
        self._save(head, evaluation, accuracy, kl)
        shutil.rmtree(config.output / BANK_FOLDER, ignore_errors=True)
        return TrainResult(head, config.output, evaluation, accuracy, kl)

    # --- gathering ---

    def _sampling(self, **values: Any) -> SamplingParams:
        config = self.config
        return SamplingParams.of(
            **{
                "max_new_tokens": config.max_reply_tokens,
                "temperature": 1.0,
                "top_k": config.top_k,
                "top_p": config.top_p,
            }
            | values
        )

    def _sample(
        self,
        name: str,
        prompts: Sequence[Sequence[Message]],
        replies_each: int,
        seed: int,
        head: MARAHead | None = None,
    ) -> list[Reply]:
        """Replies written by the model, kept on disk in parts so that an interrupted run goes on where it was."""
        part = max(1, self.decoder.scheduler.max_live // replies_each)
        sampling = self._sampling(**({"min_candidates": head.config.min_candidates} if head else {}))
        replies: list[Reply] = []
        with self.reporter.stage(name, len(prompts) * replies_each) as advance:
            for start in range(0, len(prompts), part):
                chunk = prompts[start : start + part]

                def write(chunk: Sequence[Sequence[Message]] = chunk, start: int = start) -> list[Reply]:
                    self.decoder.prefixes.clear()  # a resumed run has none, and has to see the same last digits
                    return sample_replies(
                        self.model,
                        self.decoder,
                        chunk,
                        sampling=sampling,
                        replies_each=replies_each,
                        seed=seed + start * replies_each,
                        head=head,
                        keep_positions=head is not None,
                        on_reply=advance,
                    )

                written, was_kept = kept(self.bank / f"{name.replace(' ', '-')}-{start}.pt", write)
                if was_kept:
                    advance(len(written))
                for reply in written:
                    reply.prompt += start
                replies += written
        return replies

    def _read(self, name: str, texts: Sequence[tuple[int, Sequence[Message], str]]) -> list[Reply]:
        """Replies of the data, with the states the model has while reading them; kept in parts as in `_sample`."""
        read = partial(read_replies, self.model, self.decoder.backend, max_tokens=self.config.max_reply_tokens)
        replies: list[Reply] = []
        with self.reporter.stage(name, len(texts)) as advance:
            for start in range(0, len(texts), _READ_PART):
                gather = partial(read, texts[start : start + _READ_PART], on_reply=advance)
                part, was_kept = kept(self.bank / f"{name.replace(' ', '-')}-{start}.pt", gather)
                if was_kept:
                    advance(len(part))
                replies += part
        return replies

    def _prompts(self, data: Dataset) -> list[tuple[Message, ...]]:
        """Distinct prompts in order, with the system prompt."""
        return list(dict.fromkeys(self._with_system(row.prompt) for row in data.rows))

    def _with_system(self, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
        if self.config.system_prompt and prompt[0].role != "system":
            return (Message("system", self.config.system_prompt), *prompt)
        return prompt

    def _written(self, data: Dataset) -> tuple[list[tuple[int, tuple[Message, ...], str]], list[float]]:
        """Replies the data brings, as (prompt index, prompt, text), and their labels."""
        texts, labels, index = [], [], {prompt: i for i, prompt in enumerate(self._prompts(data))}
        for row in data.rows:
            prompt = self._with_system(row.prompt)
            replies = {Pair: ("chosen", "rejected"), Labelled: ("completion",), PromptRow: ()}[type(row)]
            for field in replies:
                texts.append((index[prompt], prompt, getattr(row, field)))
                labels.append(float(row.label if isinstance(row, Labelled) else field == "chosen"))
        return texts, labels

    def _replies_each(self, num_prompts: int) -> int:
        return self.config.replies_each or max(1, min(4, self.config.max_replies // max(1, num_prompts)))

    # --- methods ---

    def _fit_rule(self, head: MARAHead) -> None:
        """Fit on base replies and on those of the data, then correct what the gated model still writes."""
        rule, config = self.plan.rule, self.config
        assert rule is not None
        train = self._limited(self._prompts(self.plan.train))
        held_out = self._limited(self._prompts(self.plan.held_out))
        replies_each = min(2, self._replies_each(len(train)))
        fitting = self._sample("base replies", train, replies_each, config.seed)
        checking = self._sample("held-out base replies", held_out, replies_each, config.seed + 500_000)
        for part, name, bank in (
            (self.plan.train, "given replies", fitting),
            (self.plan.held_out, "held-out given replies", checking),
        ):
            texts, _ = self._written(part)
            if texts:
                bank += self._read(name, texts)
        self._check_taught(fitting)
        for round_number in range(config.correction_rounds + 1):
            tables = (rule_table(self.model, fitting, rule), rule_table(self.model, checking, rule))
            with self._fitting(f"fit {round_number + 1}") as on_epoch:
                fit_rule(head, *tables, settings=self._settings(1e-3), on_epoch=on_epoch)
            if round_number < config.correction_rounds:
                seed = config.seed + 1_000_000 * (round_number + 1)
                gated = self._sample(f"gated replies {round_number + 1}", train, 1, seed, head)
                broken = sum(bool(rule.violations(reply.text)) for reply in gated)
                self._log("correction", round=round_number + 1, replies=len(gated), violations=broken)
                self.reporter.say(
                    f"  correction round {round_number + 1}: {broken} of {len(gated)} gated replies broke the rule"
                )
                fitting += gated
                checking += self._sample(
                    f"held-out gated replies {round_number + 1}", held_out, 1, seed + 500_000, head
                )

    def _check_taught(self, replies: Sequence[Reply]) -> None:
        rule = self.plan.rule
        assert rule is not None
        broken = sum(bool(rule.violations(reply.text)) for reply in replies)
        self.reporter.say(f"  {broken} of {len(replies)} replies break the rule")
        if not broken:
            raise DataError(
                f"none of {len(replies)} replies has a forbidden word ({', '.join(map(repr, rule.words))})",
                hint="use prompts that provoke the words, or data with replies that have them",
            )

    def _fit_value(self, head: MARAHead) -> Interval | None:
        """Fit V to labels or rewards; returns how well it orders held-out replies of different worth."""
        if self.plan.reward is not None:
            fitting, fit_worth = self._rewarded("base replies", self.plan.train, self.config.seed)
            checking, check_worth = self._rewarded(
                "held-out base replies", self.plan.held_out, self.config.seed + 500_000
            )
            fit_targets, check_targets = advantages(fitting, fit_worth), advantages(checking, check_worth)
            if not any(fit_targets):
                raise DataError(
                    f"the reward gave every reply {fit_worth[0]}: nothing to learn from",
                    hint="check the reward function",
                )
        else:
            texts, fit_targets = self._written(self.plan.train)
            fitting = self._read("given replies", texts)
            texts, check_targets = self._written(self.plan.held_out)
            checking = self._read("held-out given replies", texts)
        with self._fitting("fit") as on_epoch:
            history = fit_value(
                head,
                (fitting, fit_targets),
                (checking, check_targets),
                is_binary=self.plan.reward is None,
                settings=self._settings(3e-4),
                on_epoch=on_epoch,
            )
        if min(epoch.held_out_loss for epoch in history[1:]) >= history[0].held_out_loss:
            self.reporter.say(
                "  [yellow]V is no better than a constant on held-out replies: nothing was learnt that holds for other "
                "prompts. More or more consistent preferences, a reward or a rule would teach it more.[/]"
            )
        return self._ordering(head, checking, check_targets)

    def _rewarded(self, name: str, data: Dataset, seed: int) -> tuple[list[Reply], list[float]]:
        """Base replies and what the reward says of them; those it has no opinion on are left out."""
        rows = {self._with_system(row.prompt): row for row in data.rows}
        prompts = self._limited(list(rows))
        replies = self._sample(name, prompts, self._replies_each(len(prompts)), seed)
        owners = [rows[prompts[reply.prompt]] for reply in replies]
        worth = self._score(owners, replies, data)
        judged = [(reply, value) for reply, value in zip(replies, worth, strict=True) if value is not None]
        if not judged:
            raise DataError(
                f"the reward had no opinion on any of {len(replies)} {name}", hint="check the reward function"
            )
        mean = sum(value for _, value in judged) / len(judged)
        self._log("rewards", stage=name, replies=len(replies), judged=len(judged), mean_reward=mean)
        self.reporter.say(f"  mean reward of {len(judged)} {name}: {mean:+.3f}")
        return [reply for reply, _ in judged], [value for _, value in judged]

    def _score(self, rows: Sequence[Row], replies: Sequence[Reply], data: Dataset) -> list[float | None]:
        assert self.plan.reward is not None
        return score(
            self.plan.reward,
            [row.prompt for row in rows],
            [reply.text for reply in replies],
            completion_ids=[reply.token_ids for reply in replies],
            columns=gather_columns([row for row in rows if isinstance(row, PromptRow)]),
            conversational=data.form == "conversational",
        )

    def _try_reward(self) -> None:
        """Ask the reward about two short replies, so that its mistakes come out before the work, and leave nothing."""
        if self.plan.reward is not None:
            rows = self.plan.train.rows[:2]
            prompts = [self._with_system(row.prompt) for row in rows]
            sampling = self._sampling(max_new_tokens=8)
            replies = sample_replies(self.model, self.decoder, prompts, sampling=sampling, seed=self.config.seed)
            self._score(rows, replies, self.plan.train)

    def _limited(self, prompts: list[tuple[Message, ...]]) -> list[tuple[Message, ...]]:
        """At most `max_replies` of the prompts, chosen by seed."""
        if len(prompts) <= self.config.max_replies:
            return prompts
        self.reporter.say(f"  using {self.config.max_replies} of {len(prompts)} prompts (--max-replies)")
        return random.Random(self.config.seed).sample(prompts, self.config.max_replies)

    def _ordering(self, head: MARAHead, replies: Sequence[Reply], targets: Sequence[float]) -> Interval | None:
        """Share of held-out pairs to one prompt that V orders as their targets do, with a Wilson interval."""
        values = reply_values(head, replies)
        by_prompt: dict[int, list[tuple[float, float]]] = {}
        for reply, value, target in zip(replies, values, targets, strict=True):
            by_prompt.setdefault(reply.prompt, []).append((target, value))
        if all(len(group) == 1 for group in by_prompt.values()):  # labelled replies to different prompts
            by_prompt = {0: [item for group in by_prompt.values() for item in group]}
        firsts = [
            (better, worse)
            for group in by_prompt.values()
            for better, worse in zip(sorted(group)[::-1], sorted(group), strict=True)
            if better[0] > worse[0]
        ]
        if not firsts:
            return None
        right = sum(better[1] > worse[1] for better, worse in firsts)
        accuracy = wilson(right, len(firsts))
        self._log("held-out accuracy", pairs=len(firsts), accuracy=asdict(accuracy))
        interval = f"{accuracy.mean:.2f} [{accuracy.low:.2f}, {accuracy.high:.2f}]"
        doubt = " [yellow]not distinguishable from chance[/]" if accuracy.low <= 0.5 else ""
        self.reporter.say(f"  V orders {right} of {len(firsts)} held-out pairs rightly: {escape(interval)}{doubt}")
        return accuracy

    def _settings(self, learning_rate: float) -> FitSettings:
        c = self.config
        return FitSettings(c.epochs, c.patience, c.learning_rate or learning_rate, c.weight_decay, c.batch_size, c.seed)

    @contextmanager
    def _fitting(self, name: str) -> Iterator[Callable[[Epoch], None]]:
        """A stage whose steps are epochs, each logged."""
        losses: list[float] = []
        with self.reporter.stage(name, self.config.epochs) as advance:

            def on_epoch(epoch: Epoch) -> None:
                losses.append(epoch.held_out_loss)
                self._log(name, **asdict(epoch))
                advance(int(epoch.epoch > 0))

            yield on_epoch
        self.reporter.say(
            f"  {name}: held-out loss {losses[0]:.3f} -> {min(losses):.3f} after {len(losses) - 1} epochs"
        )

    # --- strength ---

    def _calibrate(self, head: MARAHead) -> tuple[float, float]:
        """Strength within the KL budget, and the KL it comes to; checked once on the gated model's own replies."""
        prompts = random.Random(self.config.seed).sample(
            pool := self._prompts(self.plan.train), min(_CALIBRATION_REPLIES, len(pool))
        )
        wide = Decoder(self.decoder.backend, Scheduler(max_live=8, knee=10_000))  # feeds all candidates at once
        untrained = MARAHead(head.config).to(self.model.device).eval()
        budget = self.config.kl_budget or (None if self.plan.method == "rule" else _DEFAULT_KL_BUDGET)
        strength, kl = 1.0, 0.0
        with self.reporter.stage("strength", 2 * len(prompts)) as advance:
            for gate_head in (untrained, head):
                replies = sample_replies(
                    self.model,
                    wide,
                    prompts,
                    sampling=self._sampling(
                        max_new_tokens=min(_CALIBRATION_TOKENS, self.config.max_reply_tokens),
                        min_candidates=head.config.min_candidates,
                    ),
                    seed=self.config.seed + 7_000_000,
                    head=gate_head,
                    keep_positions=True,
                    on_reply=advance,
                )
                positions = [position for reply in replies for position in reply.positions]
                num_tokens = sum(len(reply.token_ids) for reply in replies)
                if not positions:
                    break
                scored = score_positions(head, positions)
                if budget is not None:
                    found = strength_for_budget(scored, budget, num_tokens)
                    strength = found if gate_head is untrained else min(strength, found)
                kl = float(scored.kl(strength).sum()) / num_tokens
                head.config = head.config.model_copy(update={"strength": strength})
        if strength >= MAX_STRENGTH:
            self.reporter.say("  [yellow]the head hardly moves any token: its strength met the upper bound[/]")
        self._log("strength", strength=strength, kl_per_token=kl, budget=budget)
        bound = f"budget {budget}" if budget is not None else "no budget: a rule holds or does not"
        self.reporter.say(f"  strength {strength:.2f}, KL {kl:.3f} nats a token ({bound})")
        return strength, kl

    # --- results ---

    def _evaluate(self, head: MARAHead) -> Evaluation | None:
        if self.config.eval_prompts == 0:
            return None
        rows = list({row.prompt: row for row in self.plan.held_out.rows}.values())[: self.config.eval_prompts]
        prompts = [row if isinstance(row, PromptRow) else PromptRow(row.prompt, {}, row.source) for row in rows]
        engine = MARAEngine(self.model, head, system_prompt=self.config.system_prompt)
        with self.reporter.stage("evaluation on held-out prompts", 2 * len(prompts)) as advance:
            evaluation = evaluate(
                engine,
                prompts,
                self.plan.rule or self.plan.reward,
                seed=self.config.seed,
                temperature=0.0 if self.plan.method == "rule" else 1.0,
                max_new_tokens=self.config.max_reply_tokens,
                conversational=self.plan.held_out.form == "conversational",
                on_progress=advance,
            )
        self._log("evaluation", **figures(evaluation))
        return evaluation

    def _save(self, head: MARAHead, evaluation: Evaluation | None, accuracy: Interval | None, kl: float) -> None:
        seconds = time.monotonic() - self.started
        metrics: dict[str, Any] = {"kl_per_token": kl, "seconds": round(seconds, 1)}
        if accuracy is not None:
            metrics["held_out_accuracy"] = asdict(accuracy)
        if evaluation is not None:
            metrics["evaluation"] = figures(evaluation)
        head.config = head.config.model_copy(update={"metrics": metrics})
        head.save_pretrained(self.config.output, card=model_card(head.config, self.plan.why, evaluation))
        self._log("done", **metrics)

    def _fingerprint(self) -> str:
        parts = [
            self.config.described(),
            self.plan.train.fingerprint,
            self.model.name,
            self.model.revision,
            str(self.model.dtype),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def _begin_metrics(self) -> None:
        (self.config.output / METRICS_FILE).unlink(missing_ok=True)
        self._log("start", method=self.plan.method, model=self.model.name, config=self.config.described())

    def _log(self, event: str, **values: Any) -> None:
        line = {"event": event, "elapsed_s": round(time.monotonic() - self.started, 2), **values}
        append_line(self.config.output / METRICS_FILE, json.dumps(line))
