"""The plan of a training run: data, reward and method, checked before anything costly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from mara_integrations.data import Dataset, Labelled, PromptRow, near_copies, split
from mara_integrations.data.documents import GROUNDED, has_documents, with_documents
from mara_integrations.data.principles import Principle, make_principle
from mara_integrations.errors import ConfigError, DataError
from mara_integrations.files import check_writable
from mara_integrations.heads.hub import check_can_push
from mara_integrations.rewards import CombinedReward, DescribedRule, Reward, reward_fingerprint, reward_name
from mara_integrations.rewards.ready import about_documents
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.inputs import (
    Inputs,
    read_data,
    read_judges,
    read_other_prompts,
    read_principle,
    read_rewards,
)
from mara_integrations.training.records.trackers import check_installed
from mara_integrations.training.registry import Method, Source, choose
from mara_integrations.training.rollouts.ray_cluster import import_ray

FEW_ROWS = 30


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do.

    Attributes:
        method: The training method.
        source: What the method learns from.
        why: Why the method was chosen, as a clause.
        train: Rows that the head is fitted on.
        held_out: Rows that it is not fitted on; no prompt is on both sides.
        data_fingerprint: Hash of the rows to fit on, as they were read.
        principle: How replies should be, in words; None without it.
        rule: What is forbidden; None without it, and where it is a reward among others.
        reward: The reward; None without one.
        judges: Rewards that are only reported, by name.
        other_prompts: Prompts to generate replies to, to fit on and held out; None takes those of the data.
        warnings: Settings without influence, and what may make the head, or its figures on held-out prompts, worth
            little; a sentence each.
    """

    method: Method
    source: Source
    why: str
    train: Dataset
    held_out: Dataset
    data_fingerprint: str
    principle: Principle | None
    rule: DescribedRule | None
    reward: Reward | None
    judges: Mapping[str, Reward] = field(default_factory=dict)
    other_prompts: tuple[Dataset, Dataset] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def prompts(self) -> tuple[Dataset, Dataset]:
        """Prompts to generate replies to: to fit on, and held out."""
        return self.other_prompts or (self.train, self.held_out)

    @property
    def weighted_rewards(self) -> list[tuple[Reward, float]]:
        """The rewards, each with its weight."""
        if self.reward is None:
            return []
        return self.reward.weighted if isinstance(self.reward, CombinedReward) else [(self.reward, 1.0)]

    @property
    def learns_from_reward(self) -> bool:
        """Whether a reward that was given scores replies to learn from."""
        return self.reward is not None and self.source in ("reward", "principle", "teacher")

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of data and reward, by name."""
        decisive = self.rule or self.reward
        return {
            "data": f"{self.train.fingerprint} {self.held_out.fingerprint}",
            "prompts": " ".join(side.fingerprint for side in self.other_prompts or ()),
            "reward": reward_fingerprint(decisive) if decisive is not None else "",
            **({} if self.principle is None else {"principle": _hash(self.principle)}),
        }

    @property
    def fingerprint(self) -> str:
        """Hash of `hashes`."""
        return hashlib.sha256(json.dumps(self.hashes, sort_keys=True).encode()).hexdigest()


def _hash(principle: Principle) -> str:
    return hashlib.sha256(json.dumps([principle.described, principle.against]).encode()).hexdigest()


def make_plan(config: TrainConfig, inputs: Inputs | None = None) -> Plan:
    """Check data, reward and output folder, and choose the method.

    Raises:
        DataError: If the data can't be read or is too small.
        RewardError: If the reward can't be imported.
        OutputError: If the head could not be written, or not be pushed to the Hub.
        MissingExtraError: If a tracker or Ray is not installed.
        ConfigError: If nothing says what a good reply is, or the method can't learn from what does.
    """
    inputs = inputs or Inputs()
    _check_surroundings(config)
    principle = read_principle(config)
    data = read_data(config, inputs)
    rule, reward = read_rewards(config, inputs)
    given: dict[Source, bool] = {
        "teacher": config.teacher is not None,
        "principle": principle is not None,
        "rule": rule is not None,
        "reward": reward is not None,
        "pairs": data.kind == "pairs",
        "labels": data.kind == "labelled",
        "documents": has_documents(data),
    }
    method, source = _choose(config, data, [source for source, is_given in given.items() if is_given])
    train, held_out = split(data, config.held_out, config.seed)
    if source == "labels":
        _check_labels(data, train, held_out)
    other_prompts = read_other_prompts(config, inputs, method, source)
    warnings = [*config.without_influence(method.name), *_warnings(data, *(other_prompts or (train, held_out)))]
    if source == "documents":
        _check_documents_alone(rule, reward)
        train, held_out = (with_documents(side, config.context_template) for side in (train, held_out))
        _check_answers(train, held_out)
        principle = make_principle([GROUNDED])
    judges = read_judges(config, inputs, rule, reward)
    return Plan(
        method=method,
        source=source,
        why=_why(method.name, source, data, rule, reward) + _further_rounds(config, source),
        principle=principle,
        train=train,
        held_out=held_out,
        data_fingerprint=train.fingerprint,
        rule=rule,
        reward=reward,
        judges=about_documents(judges, config.missing_answer) if source == "documents" else judges,
        other_prompts=other_prompts,
        warnings=tuple(warnings),
    )


def _check_surroundings(config: TrainConfig) -> None:
    """Refuse what can't be written, pushed or imported."""
    check_installed(config.track)
    if config.ray:
        import_ray()
    check_writable(config.output)
    if config.push_to_hub is not None:
        check_can_push(config.push_to_hub, public=config.public)


def _choose(config: TrainConfig, data: Dataset, sources: list[Source]) -> tuple[Method, Source]:
    """Return the method and what it learns from; refuse settings that it can't honour."""
    if config.reads_again:
        sources = sources[:1]  # a teacher may read under a sentence, beside rewards; the data is there for its prompts
    num_pairs = len(data.rows) if data.kind == "pairs" else 0
    try:
        method, source = choose(config.method, sources, config.form, num_pairs=num_pairs)
    except ConfigError as error:
        raise ConfigError(f"{str(data.path)!r}: {error.message}", hint=error.hint) from None
    if method.form == "paper" and config.kl_budget is not None:
        raise ConfigError(
            f"kl_budget={config.kl_budget} is not allowed: a head of the paper's form has no scale to keep within it",
            hint="leave it out, or train a residual head",
        )
    for name in ("context_template", "missing_answer"):
        if source != "documents" and (value := getattr(config, name)) is not None:
            raise ConfigError(
                f"{name}={value!r} is not allowed: method {method.name!r} takes prompts as they are",
                hint="leave it out, or train by --method grounding on prompts with a column context",
            )
    if config.competitors and method.form == "q":
        raise ConfigError(
            f"competitors={config.competitors} is not allowed: a head of the form 'q' scores all candidates of a reply",
            hint="leave it out, or train by --form residual",
        )
    if config.engine == "llama.cpp" and method.form != "q":
        raise ConfigError(
            f"method {method.name!r} trains a head of the form {method.form!r}, and engine='llama.cpp' trains those of "
            "the form 'q' alone: it would have to feed every candidate",
            hint=("leave --form out" if method.q_loop else "take another method") + ", or train on "
            "engine='transformers'; the head runs on both",
        )
    return method, source


def _why(method: str, source: Source, data: Dataset, rule: DescribedRule | None, reward: Reward | None) -> str:
    scored = "" if reward is None else f"; {reward_name(reward)} scores them, too"
    match source:
        case "teacher":
            return f"another model reads the model's own replies{scored}"
        case "principle":
            return f"a sentence says how replies should be, and the model reads its own under it{scored}"
        case "documents":
            return "the questions have documents, and are asked with those of others, too"
        case "rule":
            assert rule is not None
            return f"what is forbidden ({rule.described}) can be found token by token"
        case "reward":
            assert reward is not None
            return f"the model's own replies will be scored by {reward_name(reward)}"
        case "pairs":
            if method == "reward-model":
                return f"a reward model of {len(data.rows)} preference pairs will score the model's own replies"
            return f"{len(data.rows)} preference pairs label their replies good and bad"
        case "labels":
            return f"{len(data.rows)} replies are labelled good or bad"


def _further_rounds(config: TrainConfig, source: Source) -> str:
    """Return the end of the clause that says why, where replies of the head are read in rounds."""
    if not config.rounds or source not in ("teacher", "principle", "documents"):
        return ""
    rounds = "one more round" if config.rounds == 1 else f"up to {config.rounds} more rounds"
    return f"; replies of the head are read in {rounds}"


def _warnings(data: Dataset, train: Dataset, held_out: Dataset) -> list[str]:
    """Return warnings about little data, and about held-out prompts that are hardly new."""
    found = []
    if len(data) < FEW_ROWS:
        found.append(
            f"{len(data)} rows are few: a head learns little from them that holds for other prompts, and figures on "
            f"{len(held_out)} held-out rows are mostly chance"
        )
    num_near, num_compared = near_copies(train.rows, held_out.rows)
    if num_near > num_compared / 4:
        found.append(
            f"{num_near} of {num_compared} held-out prompts differ from a prompt to fit on in a few words alone: "
            "figures on them are better than they would be on new prompts"
        )
    return found


def _check_documents_alone(*others: Reward | None) -> None:
    """Refuse a rule or a reward beside documents."""
    for other in others:
        if other is not None:
            raise ConfigError(
                f"method 'grounding' learns from the documents, not from {reward_name(other)}",
                hint="give --judge in place of --reward, and no rule",
            )


def _check_answers(train: Dataset, held_out: Dataset) -> None:
    """Refuse questions none of which, on one side, has documents that hold the answer."""
    for side, name in ((train, "to fit on"), (held_out, "held out")):
        if not any(isinstance(row, PromptRow) and row.columns["answerable"] for row in side.rows):
            raise DataError(
                f"{str(side.path)!r}: answerable is false for all {len(side.rows)} questions {name}",
                hint="give more questions whose documents hold the answer",
            )


def _check_labels(data: Dataset, train: Dataset, held_out: Dataset) -> None:
    """Refuse labels that can't be on both sides of the split."""
    for label, name in ((True, "good"), (False, "bad")):
        on_sides = [
            any(isinstance(row, Labelled) and row.label is label for row in side.rows) for side in (train, held_out)
        ]
        if not any(on_sides):
            raise DataError(
                f"{str(data.path)!r} has no reply labelled {name}",
                hint="label some replies each way, so that there is something to tell apart",
            )
        if not all(on_sides):
            raise DataError(
                f"{str(data.path)!r}: all replies labelled {name} answer the same prompt, so none can be held out",
                hint=f"label a reply to another prompt {name}",
            )
