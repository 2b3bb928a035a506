"""Read the rows, prompts, rewards and judges of a training run, from its settings or from Python objects."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mara_integrations.data import Dataset, column_mapping, read_dataset, read_prompts, split
from mara_integrations.data.principles import VARIED_PROMPTS, Principle, make_principle
from mara_integrations.errors import ConfigError
from mara_integrations.rewards import (
    DescribedRule,
    Required,
    Reward,
    combine_rewards,
    judges_of,
    parse_reward,
    parse_rule,
    reward_name,
    takes_partial_text,
)
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.registry import Method, Source


@dataclass(frozen=True, slots=True)
class Inputs:
    """Python objects that stand in for settings of `TrainConfig`.

    Attributes:
        data: Rows instead of `data`: dicts, a `datasets.Dataset`, a DataFrame, or a `data.Dataset`.
        prompts: Rows instead of `prompts`.
        rewards: Functions instead of `reward`, each with its weight.
        judges: Functions beside those of `judge`.
    """

    data: Any = None
    prompts: Any = None
    rewards: Sequence[tuple[Reward, float]] = ()
    judges: Sequence[Reward] = ()


def read_principle(config: TrainConfig) -> Principle | None:
    """Return how replies should be, in words; None without it.

    Raises:
        ConfigError: If the sentences can't be read together as the settings say.
    """
    principle = make_principle(config.principle, config.principle_file, config.against)
    if principle is not None and principle.weighted and config.principle_contrast != "neutral":
        raise ConfigError(
            f"contrast={config.contrast!r} is not allowed beside sentences with weights",
            hint="leave it out, or the weights: then all sentences are read together",
        )
    return principle


def read_data(config: TrainConfig, inputs: Inputs) -> Dataset:
    """Return the rows to train on: those given, or the shipped prompts where nothing but prompts is needed.

    Raises:
        DataError: If they can't be read.
        ConfigError: If they are given twice, or not at all where they are needed.
    """
    if config.reads_again and config.data is None and inputs.data is None:
        return read_prompts(VARIED_PROMPTS)
    if (config.data is None) == (inputs.data is None):
        raise ConfigError(
            "there is no data" if config.data is None else f"data is given twice: as {str(config.data)!r} and as rows",
            hint="give preference pairs, labelled replies or prompts, as a file or as rows; or a principle or teacher"
            if config.data is None
            else "leave one of them out",
        )
    return read_dataset(
        config.data if config.data is not None else inputs.data,
        config.format,
        columns=column_mapping(config.column),
        skip_bad_rows=config.skip_bad_rows,
    )


def read_rewards(config: TrainConfig, inputs: Inputs) -> tuple[DescribedRule | None, Reward | None]:
    """Return the rule whose tokens are labelled and the reward; None for what is not given.

    Raises:
        RewardError: If a reward can't be imported.
        ConfigError: If they can't be combined with each other, or with a principle or a teacher.
    """
    rule = parse_rule(config.forbid) if config.forbid else None
    required: list[tuple[Reward, float]] = [(Required(what), 1.0) for what in config.require]
    weighted = [*map(parse_reward, config.reward), *inputs.rewards]
    if rule is not None and weighted:
        raise ConfigError("give either a reward or forbidden words, not both")
    if required and rule is not None:  # what is to appear has no token to blame, so that both are rewards
        required, rule = [(rule, 1.0), *required], None
    weighted += required
    if config.reads_again:
        _check_scores_parts(config, [each for each, _ in weighted])
    reward = combine_rewards(weighted, normalise=config.normalise_rewards) if weighted else None
    for llm in judges_of(reward) if config.partial_text or config.credit == "prefix" else ():
        raise ConfigError(
            f"reward {reward_name(llm)!r} judges whole replies, and would be called some hundred times a reply",
            hint="leave --partial-text and --credit prefix out",
        )
    return rule, reward


def read_judges(config: TrainConfig, inputs: Inputs, *others: Reward | None) -> dict[str, Reward]:
    """Return the rewards that are only reported, by name, none of which is that of another reward.

    Raises:
        RewardError: If one can't be imported.
    """
    judges = [*(judge for judge, _ in map(parse_reward, config.judge)), *inputs.judges]
    return _named(judges, [reward_name(each) for each in others if each is not None])


def read_other_prompts(
    config: TrainConfig, inputs: Inputs, method: Method, source: Source
) -> tuple[Dataset, Dataset] | None:
    """Return the prompts to generate replies to where they are not those of the data, to fit on and held out.

    Raises:
        ConfigError: If the method learns from replies to the prompts of the data.
    """
    given = config.prompts if config.prompts is not None else inputs.prompts
    if given is None:
        return None
    has_preferences = source in ("pairs", "labels")
    if not has_preferences or not (method.form == "q" or method.name == "reward-model"):
        named = f"{str(given)!r} is" if isinstance(given, Path) else "rows are"
        raise ConfigError(
            f"prompts: {named} not allowed, because the head learns from the prompts of the data",
            hint="heads of the form q take them, and so does --method reward-model"
            if has_preferences
            else "name them as the data: --data takes prompts alone",
        )
    return split(read_prompts(given), config.held_out, config.seed)


def _named(judges: Sequence[Reward], taken: Sequence[str]) -> dict[str, Reward]:
    """Return the judges by name; one that shares a name with a reward or another judge is numbered."""
    named: dict[str, Reward] = {}
    for judge in judges:
        own = f"{reward_name(judge)} (judge)" if reward_name(judge) in taken else reward_name(judge)
        numbered = (f"{own} {n}" if n > 1 else own for n in itertools.count(1))
        named[next(name for name in numbered if name not in named)] = judge
    return named


def _check_scores_parts(config: TrainConfig, rewards: Sequence[Reward]) -> None:
    """Refuse rewards of whole replies beside a sentence or a teacher, which say something of every candidate."""
    for reward in rewards:
        if takes_partial_text(reward) if config.partial_text is None else config.partial_text:
            continue
        beside = "a teacher" if config.teacher is not None else "a principle"
        if_it_can = "" if config.partial_text is False else "; or say --partial-text, if it can score unfinished ones"
        raise ConfigError(
            f"reward {reward_name(reward)!r} scores whole replies, and {beside} says something of every candidate",
            hint=f"train a head of each, and compose them (--head A --head B); or name it by --judge{if_it_can}",
        )
