"""What a training run will do, settled and checked before anything costly."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mara_integrations.data import Dataset, Labelled, column_mapping, read_dataset, read_prompts, split
from mara_integrations.errors import ConfigError, DataError
from mara_integrations.files import check_writable
from mara_integrations.heads.hub import check_can_push
from mara_integrations.rewards import ForbiddenWords, Reward, load_rewards, parse_reward, reward_name
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.records.trackers import check_installed
from mara_integrations.training.registry import Method, Source, choose


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do, settled before anything costly.

    Attributes:
        method: How.
        source: What says which replies are good.
        why: In words.
        train: Rows the head is fitted on.
        held_out: Rows it is not, none of them with a prompt of the others.
        rule: Forbidden words, where they are what is taught.
        reward: What scores replies, where one was given.
        judges: Rewards that training never sees, by name.
        other_prompts: That replies are written to, fitted on and held out, where not to those of the data.
    """

    method: Method
    source: Source
    why: str
    train: Dataset
    held_out: Dataset
    rule: ForbiddenWords | None
    reward: Reward | None
    judges: Mapping[str, Reward] = field(default_factory=dict)
    other_prompts: tuple[Dataset, Dataset] | None = None

    @property
    def prompts(self) -> tuple[Dataset, Dataset]:
        """Whose prompts replies are written to: fitted on, and held out."""
        return self.other_prompts or (self.train, self.held_out)

    @property
    def fingerprint(self) -> str:
        """Of all that is fitted on."""
        return "-".join(dict.fromkeys((self.train.fingerprint, self.prompts[0].fingerprint)))


def make_plan(config: TrainConfig) -> Plan:
    """Check data, reward and output folder, and choose the method.

    Raises:
        DataError: If the data can't be read or is too small.
        RewardError: If the reward can't be imported.
        OutputError: If the head could not be written, or not be pushed to the Hub.
        MissingExtraError: If a tracker is not installed.
        ConfigError: If nothing says what a good reply is, or the method can't learn from what does.
    """
    check_writable(config.output)
    check_installed(config.track)
    if config.push_to_hub is not None:
        check_can_push(config.push_to_hub, public=config.public)
    data = read_dataset(
        config.data, config.format, columns=column_mapping(config.column), skip_bad_rows=config.skip_bad_rows
    )
    rule = ForbiddenWords(config.forbid) if config.forbid else None
    reward = load_rewards(config.reward, normalise=config.normalise_rewards) if config.reward else None
    judges = _named_judges(config, [reward_name(each) for each in (rule, reward) if each is not None])
    given: dict[Source, bool] = {
        "rule": rule is not None,
        "reward": reward is not None,
        "pairs": data.kind == "pairs",
        "labels": data.kind == "labelled",
    }
    sources = [source for source, is_given in given.items() if is_given]
    num_pairs = len(data.rows) if given["pairs"] else 0
    try:
        method, source = choose(config.method, sources, config.form, num_pairs=num_pairs)
    except ConfigError as error:
        raise ConfigError(f"{str(config.data)!r}: {error.message}", hint=error.hint) from None
    if method.form == "paper" and config.kl_budget is not None:
        raise ConfigError(
            f"kl_budget={config.kl_budget} is not allowed: a head of the paper's form has no dial to keep within it",
            hint="leave it out, or train a residual head",
        )
    prompts = None
    if config.prompts is not None:
        if method.name != "reward-model":
            raise ConfigError(
                f"prompts={str(config.prompts)!r} is not allowed: method {method.name!r} learns from those of --data",
                hint="--method reward-model can write to others than those of the preferences",
            )
        prompts = split(read_prompts(config.prompts), config.held_out, config.seed)
    train, held_out = split(data, config.held_out, config.seed)
    if source == "labels":
        _check_labels(data, train, held_out)
    return Plan(
        method, source, _why(method.name, source, data, config, rule), train, held_out, rule, reward, judges, prompts
    )


def _named_judges(config: TrainConfig, taken: Sequence[str]) -> dict[str, Reward]:
    """Return the judges by name; one that shares a name with a reward or another judge is numbered."""
    judges: dict[str, Reward] = {}
    for judge, _ in map(parse_reward, config.judge):
        own = f"{reward_name(judge)} (judge)" if reward_name(judge) in taken else reward_name(judge)
        numbered = (f"{own} {n}" if n > 1 else own for n in itertools.count(1))
        judges[next(name for name in numbered if name not in judges)] = judge
    return judges


def _why(method: str, source: Source, data: Dataset, config: TrainConfig, rule: ForbiddenWords | None) -> str:
    match source:
        case "rule":
            assert rule is not None
            return f"the words {', '.join(map(repr, rule.words))} can be told token by token"
        case "reward":
            num_prompts = len({row.prompt for row in data.rows})
            return f"replies to {num_prompts} prompts will be scored by {', '.join(config.reward)}"
        case "pairs":
            if method == "reward-model":
                return f"a model of {len(data.rows)} preference pairs will judge the model's own replies"
            return f"{len(data.rows)} preference pairs label their replies good and bad"
        case "labels":
            return f"{len(data.rows)} replies are labelled good or bad"


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
