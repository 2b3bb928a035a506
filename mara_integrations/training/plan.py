"""What a training run will do, settled and checked before anything costly."""

from __future__ import annotations

from dataclasses import dataclass

from mara_integrations.data import Dataset, Labelled, read_dataset, split
from mara_integrations.errors import ConfigError, DataError
from mara_integrations.files import check_writable
from mara_integrations.rewards import ForbiddenWords, Reward, load_reward
from mara_integrations.training.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do, settled before anything costly.

    Attributes:
        method: `value` or `rule`.
        why: In words.
        train: Rows the head is fitted on.
        held_out: Rows it is not, none of them with a prompt of the others.
        rule: What `rule` teaches.
        reward: What `value` regresses, where the data brings no labels.
    """

    method: str
    why: str
    train: Dataset
    held_out: Dataset
    rule: ForbiddenWords | None
    reward: Reward | None


def make_plan(config: TrainConfig) -> Plan:
    """Check data, reward and output folder, and choose the method.

    Raises:
        DataError: If the data can't be read or is too small.
        RewardError: If the reward can't be imported.
        OutputError: If the head could not be written.
        ConfigError: If nothing says what a good reply is.
    """
    check_writable(config.output)
    data = read_dataset(config.data)
    rule = ForbiddenWords(config.forbid) if config.forbid else None
    reward = load_reward(config.reward) if config.reward else None
    train, held_out = split(data, config.held_out, config.seed)
    num_prompts = len({row.prompt for row in data.rows})
    if rule is not None:
        method, why = "rule", f"the words {', '.join(map(repr, rule.words))} can be told token by token"
    elif reward is not None:
        method, why = "value", f"replies to {num_prompts} prompts will be scored by {config.reward}"
    elif data.kind == "pairs":
        method, why = "value", f"{len(data.rows)} preference pairs label their replies good and bad"
    elif data.kind == "labelled":
        method, why = "value", f"{len(data.rows)} replies are labelled good or bad"
        if len(labels := _labels(data)) < 2:
            raise DataError(
                f"{str(config.data)!r} has no reply labelled {'good' if labels == {False} else 'bad'}",
                hint="label some replies each way, so that there is something to tell apart",
            )
        for seed in range(config.seed, config.seed + 50):  # the first split with both labels on both sides
            train, held_out = split(data, config.held_out, seed)
            if len(_labels(train)) == len(_labels(held_out)) == 2:
                break
    else:
        raise ConfigError(
            f"{str(config.data)!r} holds prompts alone, which do not say what a good reply is",
            hint="add --reward module:function or --forbid WORD, or give pairs or labelled replies",
        )
    return Plan(method, why, train, held_out, rule, reward)


def _labels(data: Dataset) -> set[bool]:
    return {row.label for row in data.rows if isinstance(row, Labelled)}
