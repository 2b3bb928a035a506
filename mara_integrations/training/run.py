"""One training run, top to bottom: plan, model, the method's loop, scale, head on disk, evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from mara_integrations.data import Row, preview, prompt_row
from mara_integrations.evaluation.evaluate import evaluate
from mara_integrations.evaluation.metrics import Interval
from mara_integrations.evaluation.provenance import Provenance
from mara_integrations.evaluation.results import Evaluation
from mara_integrations.evaluation.summary import card_results, figures
from mara_integrations.files import write_atomically
from mara_integrations.heads.card import model_card
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.hub import push_folder
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.progress import Reporter
from mara_integrations.rewards import Reward, reward_name
from mara_integrations.runtime import MARAEngine, backend_of
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.context import Learned, Run
from mara_integrations.training.gather import conversation_of, try_reward
from mara_integrations.training.methods import preference, reward_model, rloo, rule, sac, value
from mara_integrations.training.plan import make_plan
from mara_integrations.training.records.metrics_log import MetricsLog
from mara_integrations.training.records.store import model_fingerprint
from mara_integrations.training.rollouts.ray_writers import RayWriters
from mara_integrations.training.rollouts.writers import Writers, WritersHere
from mara_integrations.training.scoring.ray_rewards import import_ray, on_ray
from mara_integrations.training.scoring.reward_files import keep_rewards
from mara_integrations.training.scoring.scale import calibrate

SETTINGS_FILE = "train.yaml"
_SHOWN_CHARACTERS = 600  # of a sample

# The loop of each of `methods.METHODS`: fits the head in place, and says how that went.
LOOPS: dict[str, Callable[[Run, MARAHead], Learned]] = {
    "value": value.learn,
    "dpo": preference.learn_dpo,
    "kto": preference.learn_kto,
    "reward-model": reward_model.learn,
    "rloo": rloo.learn,
    "rule": rule.learn,
    "sac": sac.learn,
    "sac-published": sac.learn,
}


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run leaves.

    Attributes:
        head: The head, as saved.
        output: Its folder.
        evaluation: On held-out prompts, base against gated; None where none was asked for.
        held_out_accuracy: Share of held-out pairs of better and worse replies that V orders rightly; None where there
            are none.
        kl_per_token: KL(gate || base) on the gated model's replies, in nats a token.
    """

    head: MARAHead
    output: Path
    evaluation: Evaluation | None
    held_out_accuracy: Interval | None
    kl_per_token: float


def train(config: TrainConfig, reporter: Reporter | None = None) -> TrainResult:
    """Train a head; see `TrainConfig` for what can be said, `make_plan` for what is refused.

    Started again after an interruption with the same settings, it takes up what it had already gathered.

    Raises:
        MaraError: See `make_plan`, `load_model`, `rewards.score`.
    """
    run = begin(config, reporter or Reporter())
    try:
        return _train(run)
    finally:
        run.writers.close()


def _train(run: Run) -> TrainResult:
    config = run.config
    if run.plan.source == "reward":
        try_reward(run)
    with run.logging():
        torch.manual_seed(config.seed)
        head = run.new_head()
        learned = LOOPS[run.plan.method.name](run, head)
        kl = calibrate(run, head) if learned.kl_per_token is None else learned.kl_per_token
        if not learned.rewards and run.plan.source in ("pairs", "labels"):
            learned = replace(learned, rewards=reward_model.judge_of_preferences(run))
        keep_rewards(config.output, head, learned.rewards)
        head.save_pretrained(config.output)  # before the evaluation, so that it is not lost with it
        evaluation = _evaluate(run, head, learned)
        _save(run, head, evaluation, learned, kl)
    run.forget()
    if config.push_to_hub is not None:
        address = push_folder(config.output, config.push_to_hub, public=config.public)
        run.say(f"[bold]Hub[/]    {escape(address)}")
    return TrainResult(head, config.output, evaluation, learned.held_out_accuracy, kl)


def begin(config: TrainConfig, reporter: Reporter) -> Run:
    """Settle the plan, then load the model; nothing is written."""
    plan = make_plan(config)
    reporter.say(f"[bold]Method[/] {plan.method.name}: {escape(plan.why)}")
    count = f"{len(plan.train.rows)} rows to fit on, {len(plan.held_out.rows)} held out, split by prompt"
    reporter.say(f"[bold]Data[/]   {escape(str(config.data))}: {count}")
    if plan.other_prompts is not None:
        written_to = f"{len(plan.prompts[0].rows)} prompts to write to, {len(plan.prompts[1].rows)} held out"
        reporter.say(f"[bold]Prompts[/] {escape(str(config.prompts))}: {written_to}")
    for note in plan.train.notes:
        reporter.say(f"  {escape(note)}")
    if config.ray:
        import_ray()  # or say what is missing, before the model is loaded
    spec = ModelSpec(
        config.model,
        config.device,
        config.dtype,
        model_kwargs=config.model_kwargs,
        quantization=config.quantization,
    )
    model = load_model(spec)
    reporter.say(f"[bold]Model[/]  {escape(model.name)} on {model.device}, {model.number_format}")
    backend = backend_of(model)
    writers: Writers = WritersHere(model, backend)
    if config.ray:
        writers = RayWriters(spec, config.ray, model.device.type == "cuda", reporter.say)
        plan = replace(plan, reward=plan.reward and on_ray(plan.reward))
    run = Run(config, plan, model, backend, model_fingerprint(model), writers, reporter, MetricsLog(config.output))
    _show_samples(run)
    return run


def _show_samples(run: Run) -> None:
    """The first rows as the model sees them, so that a mistaken format shows before the work."""

    def render(row: Row) -> str:
        prompt = conversation_of(run, row)
        return run.model.encoder.render(prompt.messages, prompt.tools)

    what, samples = preview(run.plan.train, render)
    run.say(f"[bold]Rows[/]   {escape(what)}; the first ones, as the model sees them:")
    for sample in samples:
        text = sample if len(sample) <= _SHOWN_CHARACTERS else f"{sample[:_SHOWN_CHARACTERS]}…"
        run.say("\n".join(f"  | {escape(line)}" for line in text.splitlines()))


def _evaluate(run: Run, head: MARAHead, learned: Learned) -> Evaluation | None:
    """Base against gate on held-out prompts."""
    config, plan = run.config, run.plan
    if config.eval_prompts == 0:
        return None
    held_out = plan.prompts[1]
    rows = {(row.prompt, row.tools): prompt_row(row) for row in held_out.rows}
    prompts = list(rows.values())[: config.eval_prompts]
    engine = MARAEngine(run.model, head, system_prompt=config.system_prompt)
    with run.stage("evaluation on held-out prompts", 2 * len(prompts)) as advance:
        evaluation = evaluate(
            engine,
            prompts,
            {**(learned.rewards or _named(plan.rule or plan.reward)), **plan.judges},
            seed=config.seed,
            temperature=plan.method.temperature,
            max_new_tokens=config.max_reply_tokens,
            conversational=held_out.form == "conversational",
            on_progress=advance,
        )
    run.log("evaluation", **figures(evaluation))
    return evaluation


def _named(reward: Reward | None) -> dict[str, Reward]:
    return {} if reward is None else {reward_name(reward): reward}


def _save(run: Run, head: MARAHead, evaluation: Evaluation | None, learned: Learned, kl: float) -> None:
    """The head with its figures and its card."""
    made = Provenance.now()
    metrics: dict[str, Any] = {"date": made.date, "version": made.version}
    metrics |= {"rows": len(run.plan.train.rows), "held_out_rows": len(run.plan.held_out.rows)}
    metrics |= {"kl_per_token": kl, "seconds": round(run.metrics.elapsed_s, 1)}
    if learned.held_out_accuracy is not None:
        metrics["held_out_accuracy"] = asdict(learned.held_out_accuracy)
    if evaluation is not None:
        metrics["evaluation"] = figures(evaluation)
    head.config = head.config.model_copy(update={"metrics": metrics})
    write_atomically(run.config.output / SETTINGS_FILE, run.config.to_yaml())
    results = None if evaluation is None else card_results(evaluation)
    head.save_pretrained(run.config.output, card=model_card(head.config, why=run.plan.why, results=results))
    run.log("done", **metrics)
