"""One training run, top to bottom: `train` and `_train` are the page to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from mara_integrations.data import Row, preview, prompt_row
from mara_integrations.data.principles import PrincipleLike, notations
from mara_integrations.evaluation.evaluate import evaluate
from mara_integrations.evaluation.metrics import Interval
from mara_integrations.evaluation.results import Evaluation
from mara_integrations.evaluation.summary import card_results, figures
from mara_integrations.files import write_atomically
from mara_integrations.heads.card import model_card
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.hub import push_folder
from mara_integrations.heads.q import QHead
from mara_integrations.models.load import ModelSpec, load_model, read_outline
from mara_integrations.progress import Reporter
from mara_integrations.rewards import Reward, RewardLike, reward_name, weighted_rewards
from mara_integrations.runtime import MARAEngine, backend_of
from mara_integrations.training.collect.prompts import conversation
from mara_integrations.training.collect.rewards import check_reward
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.context import WORK_FOLDER, MethodResult, Run
from mara_integrations.training.engine import with_choices
from mara_integrations.training.identity import IDENTITY_FILE, Identity
from mara_integrations.training.inputs import Inputs
from mara_integrations.training.long_prompts import without_long_prompts
from mara_integrations.training.methods.reward_model import fit_judge
from mara_integrations.training.plan import Plan, make_plan
from mara_integrations.training.recipes import read_recipe
from mara_integrations.training.records.metrics_log import MetricsLog
from mara_integrations.training.records.output_lock import locked
from mara_integrations.training.resume import finished_head, interrupted_differences
from mara_integrations.training.rollouts.ray_workers import RayWorkers
from mara_integrations.training.rollouts.workers import LocalWorker, RolloutWorkers
from mara_integrations.training.scoring.llm_judges import check_judges, open_judges, report_agreement
from mara_integrations.training.scoring.q_scale import calibrate_q
from mara_integrations.training.scoring.ray_rewards import on_ray
from mara_integrations.training.scoring.reward_files import keep_rewards
from mara_integrations.training.scoring.scale import calibrate
from mara_integrations.training.teachers import NAMES, check_teachers, look_at_teachers

SETTINGS_FILE = "train.yaml"


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The result of a run.

    Attributes:
        head: The head, as saved.
        output: Its folder.
        evaluation: Comparison of base model and head on held-out prompts; None where none was asked for, or where the
            head was finished before.
        held_out_accuracy: Share of held-out pairs of a better and a worse reply that are ordered correctly, by the head
            or by its reward model; None where there are no pairs.
        kl_per_token: KL(gate || base) on the gated model's replies, in nats a token.
        was_finished: Whether the head was there already, trained by the same settings on the same data.
    """

    head: MARAHead
    output: Path
    evaluation: Evaluation | None
    held_out_accuracy: Interval | None
    kl_per_token: float
    was_finished: bool = False


def train(
    config: TrainConfig,
    *,
    data: Any = None,
    prompts: Any = None,
    reward: RewardLike | Sequence[RewardLike] = (),
    judge: RewardLike | Sequence[RewardLike] = (),
    principle: PrincipleLike | Sequence[PrincipleLike] = (),
    model: Any = None,
    reporter: Reporter | None = None,
) -> TrainResult:
    """Train a head and write it into the output folder.

    Given the same config and data again, an interrupted run continues where it was, and a finished one is returned.

    Args:
        config: Settings of the run.
        data: Rows instead of `config.data`: dicts, a `datasets.Dataset` or a DataFrame, in the forms that
            `data.read_dataset` reads.
        prompts: Rows instead of `config.prompts`.
        reward: Function with TRL's signature, beside those of `config.reward`; several, or pairs of a function and its
            weight, are summed.
        judge: Function that is only reported, beside those of `config.judge`; or several.
        principle: Sentence that says how replies should be, beside those of `config.principle`; several, or pairs of a
            sentence and its weight.
        model: A loaded `(model, tokenizer)` instead of `config.model`.
        reporter: Receives text and progress; None shows nothing.

    Raises:
        MaraError: If something is refused, see `make_plan`, or fails, see `load_model` and `rewards.score`.

    Example:
        >>> train(TrainConfig(output="heads/brief"), data=rows, reward=brevity)
    """
    judges = [each for each, _ in weighted_rewards(judge)]
    if sentences := notations(principle):  # a setting like any other: recorded, and part of what decides the head
        config = config.updated(principle=(*config.principle, *sentences))
    reporter = reporter or Reporter()
    if model is None:
        config = with_choices(config, reporter)
    plan = make_plan(config, Inputs(data, prompts, weighted_rewards(reward), judges))  # refuses what can't work
    return train_plan(config, plan, model=model, reporter=reporter)


def train_plan(config: TrainConfig, plan: Plan, *, reporter: Reporter, model: Any = None) -> TrainResult:
    """Carry out a plan: return the finished head, or continue an interrupted run, or start one; see `train`."""
    identity = Identity.of(config, plan)
    with locked(config.output, config.output / WORK_FOLDER):
        finished = finished_head(config, identity)
        if finished is not None:
            result = _finished_result(config, finished, reporter)
        else:
            run = start(config, plan, identity, reporter, model)
            try:
                result = _train(run)
            finally:
                run.workers.close()
        if config.push_to_hub is not None:
            address = push_folder(config.output, config.push_to_hub, public=config.public)
            reporter.say(f"[bold]Hub[/]    {escape(address)}")
    return result


def start(config: TrainConfig, plan: Plan, identity: Identity, reporter: Reporter, model: Any = None) -> Run:
    """Report the plan, load the model and start the rollout workers; write nothing."""
    _report_plan(config, plan, reporter)
    _report_interrupted(config, identity, reporter)
    spec = ModelSpec(
        model or config.model,
        config.device,
        config.dtype,
        model_kwargs=config.model_kwargs,
        quantization=config.quantization,
        engine=config.engine,
    )
    outline = read_outline(spec)
    check_teachers(config, outline.tokenizer)
    plan, left_out = without_long_prompts(config, plan, outline)
    if left_out is not None:
        reporter.say(f"  [yellow]{escape(left_out)}[/]")
    loaded = load_model(spec)
    reporter.say(f"[bold]Model[/]  {escape(loaded.name)} on {loaded.device}, {loaded.number_format}")
    teachers = look_at_teachers(config, loaded, reporter)
    hashes = {NAMES[role]: teacher.fingerprint for role, teacher in teachers.items()}
    identity_before, identity = identity, identity.with_model(loaded, hashes)
    if not interrupted_differences(config.output, identity_before):
        _report_interrupted(config, identity, reporter)
    backend = backend_of(loaded)
    workers: RolloutWorkers = LocalWorker(loaded, backend)
    if config.ray:
        workers = RayWorkers(spec, config.ray, loaded.device.type == "cuda", reporter.say)
        plan = replace(plan, reward=plan.reward and on_ray(plan.reward))
    run = Run(config, plan, identity, loaded, backend, workers, reporter, MetricsLog(config.output), teachers)
    if (run.folder / IDENTITY_FILE).exists():
        reporter.say(
            "[bold]Resume[/] an interrupted run in this folder is continued: what it finished is not done again"
        )
    _show_samples(run)
    return run


def _train(run: Run) -> TrainResult:
    config, plan = run.config, run.plan
    open_judges(run)
    check_judges(run)
    if plan.learns_from_reward:
        check_reward(run)  # 1. score two short replies: a mistake in the reward shows before the work
    with run.logging():
        torch.manual_seed(config.seed)
        head = run.new_head()
        agreement = report_agreement(run)
        result = plan.method.train(run, head)  # 2. the method collects replies and fits the head to them
        result = replace(result, metrics={**result.metrics, **agreement})
        if result.kl_per_token is None:
            kl = calibrate_q(run, head) if isinstance(head, QHead) else calibrate(run, head)
            result = replace(result, kl_per_token=kl)  # 3. scale the head to the KL budget
        if not result.rewards and plan.source in ("pairs", "labels"):
            result = replace(result, rewards=fit_judge(run))  # 4. fit a reward model to evaluate the head by
        keep_rewards(config.output, head, result.rewards)  # 5. save reward models
        head.save_pretrained(config.output)  # 6. save the head, before an evaluation that may fail
        evaluation = _evaluate(run, head, result)  # 7. compare base model and head on held-out prompts
        _save_final(run, head, evaluation, result)  # 8. save metrics, model card and settings
    run.finish()
    assert result.kl_per_token is not None
    return TrainResult(head, config.output, evaluation, result.held_out_accuracy, result.kl_per_token)


def _report_plan(config: TrainConfig, plan: Plan, reporter: Reporter) -> None:
    if config.recipe is not None:
        reporter.say(f"[bold]Recipe[/] {config.recipe}: {escape(read_recipe(config.recipe).description)}")
    reporter.say(f"[bold]Method[/] {plan.method.name}: {escape(plan.why)}")
    sides = f"{len(plan.train.rows)} rows to fit on, {len(plan.held_out.rows)} held out; no prompt is on both sides"
    reporter.say(f"[bold]Data[/]   {escape(str(plan.train.path))}: {sides}")
    if plan.principle is not None:
        made = "  (made of it)" if plan.principle.is_derived else ""
        for line in plan.principle.described.splitlines() if plan.principle.weighted else [plan.principle.text]:
            reporter.say(f"[bold]Sentence[/] {escape(line)}")
        if config.principle_contrast != "neutral":
            reporter.say(f"[bold]Opposite[/] {escape(plan.principle.against)}{made}")
    if plan.other_prompts is not None:
        sides = f"{len(plan.prompts[0].rows)} to reply to, {len(plan.prompts[1].rows)} held out"
        reporter.say(f"[bold]Prompts[/] {escape(str(plan.prompts[0].path))}: {sides}")
    for note in plan.train.notes:
        reporter.say(f"  {escape(note)}")
    for warning in plan.warnings:
        reporter.say(f"  [yellow]{escape(warning)}[/]")


def _report_interrupted(config: TrainConfig, identity: Identity, reporter: Reporter) -> None:
    """Say why an interrupted run in the output folder is not continued."""
    differences = interrupted_differences(config.output, identity)
    if differences:
        reporter.say(
            "  [yellow]an interrupted run in this folder is not continued, because it would end with another head: "
            f"{escape('; '.join(differences))}[/]"
        )


def _finished_result(config: TrainConfig, head: MARAHead, reporter: Reporter) -> TrainResult:
    reporter.say(
        f"[bold]Head[/]   {escape(str(config.output))} is finished already, by the same settings on the same data; "
        "--overwrite trains it again"
    )
    metrics = head.config.metrics
    accuracy = metrics.get("held_out_accuracy")
    return TrainResult(
        head,
        config.output,
        evaluation=None,
        held_out_accuracy=None if accuracy is None else Interval(**accuracy),
        kl_per_token=metrics["kl_per_token"],
        was_finished=True,
    )


def _show_samples(run: Run) -> None:
    """Show the first rows as the model sees them, so that a wrong format shows before the work."""

    def render(row: Row) -> str:
        prompt = conversation(run, row)
        return run.model.encoder.render(prompt.messages, prompt.tools)

    kind, samples = preview(run.plan.train, render)
    run.say(f"[bold]Rows[/]   {escape(kind)}; the first ones, as the model sees them:")
    for sample in samples:
        run.say("\n".join(f"  | {escape(line)}" for line in sample.splitlines()))


def _evaluate(run: Run, head: MARAHead, result: MethodResult) -> Evaluation | None:
    """Compare base model and head on held-out prompts."""
    config, plan = run.config, run.plan
    if config.eval_prompts == 0:
        return None
    held_out = plan.prompts[1]
    rows = {(row.prompt, row.tools): prompt_row(row) for row in held_out.rows}
    prompts = list(rows.values())[: config.eval_prompts]
    reward = plan.rule or plan.reward
    rewards: dict[str, Reward] = dict(result.rewards) or ({} if reward is None else {reward_name(reward): reward})
    engine = MARAEngine(run.model, head, system_prompt=config.system_prompt)
    with run.stage("evaluation on held-out prompts", 2 * len(prompts)) as advance:
        evaluation = evaluate(
            engine,
            prompts,
            {**rewards, **plan.judges},
            seed=config.seed,
            temperature=plan.method.temperature,
            max_new_tokens=config.max_reply_tokens,
            conversational=held_out.form == "conversational",
            on_progress=advance,
        )
    run.log("evaluation", **figures(evaluation))
    return replace(evaluation, head=str(config.output))  # the engine had it as an object, which has no name


def _save_final(run: Run, head: MARAHead, evaluation: Evaluation | None, result: MethodResult) -> None:
    """Save the head again, with its metrics, its model card and the settings of the run."""
    metrics: dict[str, Any] = {"kl_per_token": result.kl_per_token, "seconds": round(run.metrics.elapsed_s, 1)}
    metrics |= result.metrics
    if result.held_out_accuracy is not None:
        metrics["held_out_accuracy"] = asdict(result.held_out_accuracy)
    if evaluation is not None:
        metrics["evaluation"] = figures(evaluation)
    head.config = head.config.model_copy(update={"metrics": metrics})
    write_atomically(run.config.output / SETTINGS_FILE, run.config.to_yaml())
    results = None if evaluation is None else card_results(evaluation)
    head.save_pretrained(run.config.output, card=model_card(head.config, why=run.plan.why, results=results))
    run.log("done", **metrics)
