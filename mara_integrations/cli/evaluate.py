"""`mara-tools eval`."""

from __future__ import annotations

import itertools
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mara_integrations.cli.app import say
from mara_integrations.cli.config_file import ConfigFile
from mara_integrations.cli.options import (
    HEAD,
    REPLIES,
    Column,
    DataFormat,
    Device,
    Dtype,
    Engine,
    Heads,
    MaxNewTokens,
    Model,
    ModelKwargs,
    Quantise,
    SkipBadRows,
    Strength,
    SystemPrompt,
    Temperature,
    given,
    head_source,
)
from mara_integrations.errors import ConfigError, DataError
from mara_integrations.models.options import keyword_arguments
from mara_integrations.progress import ConsoleReporter

if TYPE_CHECKING:
    from mara_integrations.data import Dataset
    from mara_integrations.heads.config import HeadConfig
    from mara_integrations.rewards import Reward
    from mara_integrations.runtime import MARAEngine

_SCORES = "Scores and report"
_GROUNDING = "grounding"  # method of heads for documents


def evaluate_head(
    head: Heads,
    data: Annotated[
        Path,
        typer.Option(help="File of prompts; pairs and labelled replies have prompts, too.", rich_help_panel="Data"),
    ],
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HEAD",
            help="Other head to compare with the one of --head, on the same prompts and the same random numbers. May "
            "be repeated.",
            rich_help_panel=HEAD,
        ),
    ] = None,
    format: DataFormat = "auto",
    column: Column = None,
    context_template: Annotated[
        str | None,
        typer.Option(
            help="For questions with a column context: the prompt of your application, with {context_str} where the "
            "documents stand and {query_str} for the question. Each is asked with its own documents and with others.",
            show_default="that of a head for documents",
            rich_help_panel="Data",
        ),
    ] = None,
    skip_bad_rows: SkipBadRows = False,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REWARD",
            help="Score to compare by: module:function with TRL's signature, hf:MODEL, llm:PROVIDER:MODEL, or a "
            "built-in reward such as sentiment. May be repeated.",
            show_default="the head's own",
            rich_help_panel=_SCORES,
        ),
    ] = None,
    forbid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT",
            help="What must not appear in replies: a word or phrase, re:PATTERN or rule:NAME. May be repeated.",
            show_default="the head's own",
            rich_help_panel=_SCORES,
        ),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT",
            help="What must appear in each reply, in the same notation. May be repeated.",
            rich_help_panel=_SCORES,
        ),
    ] = None,
    max_judge_calls: Annotated[
        int,
        typer.Option(
            min=1,
            help="Calls that LLM judges may make. Their answers are kept: the same command goes on from there.",
            rich_help_panel=_SCORES,
        ),
    ] = 5000,
    trust_head_code: Annotated[
        bool,
        typer.Option(
            "--trust-head-code",
            help="Import functions and load models that the head records as its rewards. Only for heads of your own.",
            rich_help_panel=_SCORES,
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            help="File to write: a page to look at (.html), or everything for other programs (.json).",
            rich_help_panel=_SCORES,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Number of prompts to use.", show_default="all", rich_help_panel="Data"),
    ] = None,
    examples: Annotated[
        int, typer.Option(min=0, help="Number of prompts whose replies are printed.", rich_help_panel=_SCORES)
    ] = 3,
    strength: Strength = None,
    temperature: Temperature = 0.0,
    max_new_tokens: MaxNewTokens = 128,
    seed: Annotated[
        int, typer.Option(help="Seed of the sampling and of the bootstrap intervals.", rich_help_panel=REPLIES)
    ] = 0,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Number of prompts decoded together.", rich_help_panel=REPLIES)
    ] = 64,
    system_prompt: SystemPrompt = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantise = None,
    model_kwargs: ModelKwargs = None,
    engine_name: Engine = "auto",
    config_file: ConfigFile = None,
) -> None:
    """Compare the base model with and without a head, on the same prompts and the same random numbers.

    Examples:
      mara-tools eval --head heads/brand --data prefs.jsonl --report report.html
      mara-tools eval --head heads/brand --compare heads/warm --data prefs.jsonl
    """
    from mara_integrations.data import column_mapping, prompts_of, read_dataset
    from mara_integrations.data.documents import has_documents, with_documents
    from mara_integrations.rewards import Required, judges_of, parse_reward, parse_rule
    from mara_integrations.rewards.judges import CallBudget, JudgeSession
    from mara_integrations.rewards.ready import about_documents

    rows = read_dataset(data, format, columns=column_mapping(column or ()), skip_bad_rows=skip_bad_rows)
    _check_template(context_template, rows)
    budget = CallBudget(max_judge_calls)
    rewards: list[Reward] = [parse_reward(text)[0] for text in reward or ()]
    if forbid:
        rewards.append(parse_rule(forbid))
    rewards += map(Required, require or ())

    from mara_integrations.evaluation import console as shown
    from mara_integrations.evaluation import report as reports
    from mara_integrations.evaluation.evaluate import evaluate
    from mara_integrations.evaluation.head_comparison import compare_heads
    from mara_integrations.evaluation.provenance import Provenance
    from mara_integrations.runtime import MARAEngine

    if report is not None:
        reports.check_report_path(report)
    settings = given(strength=strength, quantization=quantization, model_kwargs=keyword_arguments(model_kwargs or ()))
    settings |= {"engine": engine_name, "trace": True}  # an engine without traces is refused before it loads
    engine = MARAEngine(
        model, head_source(head), device=device, dtype=dtype, system_prompt=system_prompt, **settings
    ).load()
    others = [head_source([text]) for text in compare or ()]
    configs = [_config(engine, source) for source in (head_source(head), *others)]
    console, why, config = Console(), "", configs[0]
    held_out = _held_out_of_all(data, configs)
    if held_out is not None:
        rows, why = held_out, "; the head was trained on this file, so only those held out then"
    asks_documents = (context_template is not None or config.method == _GROUNDING) and has_documents(rows)
    if asks_documents:
        template = context_template or config.training.get("context_template")
        _check_template(template)
        rows, why = with_documents(rows, template), f"{why}; each question with its own documents and with others"
    prompts = prompts_of(rows)
    if limit is not None:
        prompts = replace(prompts, rows=prompts.rows[:limit])
    say(console, "Prompts", f"{len(prompts)} of {data}{why}")
    for note in prompts.notes:
        say(console, "", note)
    origin = ""
    if not rewards:
        from mara_integrations.heads.source import heads
        from mara_integrations.training.scoring.recorded_rewards import recorded_rewards

        folders = [heads.locate(source).path for source in head_source(head) or ()]
        rewards, left_out = recorded_rewards(configs[0].rewards, folders, engine.model, trust_code=trust_head_code)
        origin = " (recorded with the head)" if rewards else ""
        for reason in left_out:
            warnings.warn(reason, stacklevel=2)
    named = _named(rewards)
    if asks_documents:
        named = about_documents(named, config.metrics.get("missing_answer"))
    for judge in judges_of(*rewards):
        judge.session = JudgeSession(budget=budget)
    say(console, "Rewards", "; ".join(map(_described, named.values())) + origin if named else "none")
    say(console, "Model", f"{engine.model.name} on {engine.model.device}, {engine.model.number_format}")
    num_replies = 2 * len(prompts) * (1 + len(others))
    with ConsoleReporter(console).stage("base and gated replies", num_replies) as advance:
        evaluation, *other_evaluations = (
            evaluate(
                engine,
                prompts,
                named,
                temperature=temperature,
                seed=seed,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                on_progress=advance,
                head=source,
            )
            for source in (head_source(head), *others)
        )
    comparisons = [compare_heads(evaluation, other, seed) for other in other_evaluations]
    if report is not None:
        provenance = Provenance.now(_command(), str(data), prompts.fingerprint)
        reports.write_report(evaluation, report, provenance, comparisons)
    if examples:
        shown.print_examples(console, evaluation, examples)
        shown.print_regressions(console, evaluation)
    shown.print_summary(console, evaluation)
    for comparison in comparisons:
        shown.print_comparison(console, comparison)
    if report is not None:
        say(console, "Report", str(report))


def _command() -> str:
    """Return the command line where this process is `mara-tools`, else an empty text."""
    is_ours = Path(sys.argv[0]).name in ("mara-tools", "__main__.py")
    return shlex.join(["mara-tools", *sys.argv[1:]]) if is_ours else ""


def _named(rewards: Sequence[Reward]) -> dict[str, Reward]:
    """Return the rewards by name; where several share one, those after the first get a number."""
    from mara_integrations.rewards import reward_name

    named: dict[str, Reward] = {}
    for reward in rewards:
        own = reward_name(reward)
        numbered = (f"{own} {n}" if n > 1 else own for n in itertools.count(1))
        named[next(name for name in numbered if name not in named)] = reward
    return named


def _check_template(template: str | None, rows: Dataset | None = None) -> None:
    """Refuse a template without its places, or for rows without documents."""
    from mara_integrations.data.documents import CONTEXT, QUERY, has_documents, is_template

    if template is None:
        return
    if not isinstance(template, str) or not is_template(template):  # that of a head may be anything
        raise ConfigError(f"context_template={template!r} is not allowed", hint=f"it needs {CONTEXT} once, and {QUERY}")
    if rows is not None and not has_documents(rows):
        raise ConfigError(
            f"context_template={template!r} is not allowed: {str(rows.path)!r} holds no questions with documents",
            hint="each row needs a column context, a text or a list of texts; or leave it out",
        )


def _config(engine: MARAEngine, source: Mapping[str, float] | None) -> HeadConfig:
    """Return the config of a head, which is loaded, and checked against the model.

    Raises:
        ConfigError: If it has the weight 0.
        HeadError: If it can't be read, or does not fit the model.
    """
    head = engine.resolve(head=source).head
    if head is None:
        raise ConfigError(f"head {', '.join(source or ())} has the weight 0", hint="there is nothing to evaluate")
    return head.config


def _held_out_of_all(path: Path, configs: Sequence[HeadConfig]) -> Dataset | None:
    """Return the prompts that none of the heads was fitted on, if one was trained on this very file, else None.

    Raises:
        DataError: If there is no such prompt.
    """
    held_out = [found for config in configs if (found := _held_out(path, config)) is not None]
    if not held_out:
        return None
    shared = set.intersection(*({row.prompt for row in found.rows} for found in held_out))
    rows = tuple(row for row in held_out[0].rows if row.prompt in shared)
    if not rows:
        raise DataError(f"{str(path)!r} has no prompt that is new to all these heads", hint="give other prompts")
    return replace(held_out[0], rows=rows)


def _held_out(path: Path, config: HeadConfig) -> Dataset | None:
    """Return the rows that a head was not fitted on, if it was trained on this very file, else None."""
    from mara_integrations.data import column_mapping, read_dataset, read_prompts, split
    from mara_integrations.data.documents import has_documents, with_documents

    trained = config.training
    share, seed = trained.get("held_out"), trained.get("seed")
    if share is None or seed is None:
        return None
    if config.origin and (of_prompts := config.origin.hashes.get("prompts")):
        with suppress(DataError):
            fitted, held_out = split(read_prompts(path), share, seed)
            if fitted.fingerprint == of_prompts.split()[0]:
                return held_out
    try:
        data = read_dataset(
            path,
            trained.get("format", "auto"),
            columns=column_mapping(trained.get("column", ())),
            skip_bad_rows=trained.get("skip_bad_rows", False),
        )
        fitted, held_out = split(data, share, seed)
        if config.method == _GROUNDING and has_documents(fitted):
            fitted = with_documents(fitted, trained.get("context_template"))
    except DataError:  # one prompt alone can't be split: another file
        return None
    return held_out if fitted.fingerprint == config.data_fingerprint else None


def _described(reward: Reward) -> str:
    from mara_integrations.rewards import FunctionReward, reward_name

    if hasattr(reward, "described"):
        return f"forbidden {reward.described}"
    return reward.path if isinstance(reward, FunctionReward) else reward_name(reward)
