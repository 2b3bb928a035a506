"""The `reward-model` method: fit a small reward model to the preferences, then train the head against it with `rloo`.

The replies of preference data are mostly not the model's own. A reward model scores what the model itself generates. A
second reward model, fitted to preferences that the first one never sees, only reports.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace

from mara_integrations.data import Labelled, Pair, Row
from mara_integrations.data.rows import prompt_key
from mara_integrations.errors import DataError
from mara_integrations.evaluation.metrics import Interval
from mara_integrations.heads.head import MARAHead
from mara_integrations.rewards import Reward
from mara_integrations.training.collect.workload import Workload
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.methods.q_rewards import QLearner
from mara_integrations.training.methods.reward_rounds import train_on_reward, work_on_reward
from mara_integrations.training.methods.rloo import ResidualLearner
from mara_integrations.training.scoring.fitted_reward import LabelledText, Preferences, RewardModel
from mara_integrations.training.scoring.fitted_reward import Pair as TextPair
from mara_integrations.training.scoring.held_out import reward_accuracy, shown_accuracy

REWARD_MODEL, SECOND_JUDGE = "reward model", "second judge"
_JUDGE_SHARE = 0.3  # of the prompts: the second model is fitted to them, and the first one is not
_MIN_EXAMPLES = 20


def train(run: Run, head: MARAHead) -> MethodResult:
    """Fit both reward models, report how well they order held-out pairs, and train the head against the first."""
    rows = run.plan.train.rows
    keys = sorted({prompt_key(row) for row in rows})
    judge_keys = set(run.random().sample(keys, round(_JUDGE_SHARE * len(keys))))
    sides = [
        preferences(run, [row for row in rows if (prompt_key(row) in judge_keys) is is_judge])
        for is_judge in (False, True)
    ]
    if min(map(len, sides)) < _MIN_EXAMPLES or any(not _are_usable(side) for side in sides):
        raise DataError(
            f"{sum(map(len, sides))} preferences are too few for a reward model and a second one that judges it",
            hint=f"at least {4 * _MIN_EXAMPLES} are needed, good and bad ones; `--method value` needs fewer",
        )
    reward, judge = (RewardModel.fit(side, run.config.seed, run.model) for side in sides)
    accuracy = _report_accuracy(run, REWARD_MODEL, reward)
    _report_accuracy(run, SECOND_JUDGE, judge)
    with_reward = replace(run, plan=replace(run.plan, reward=reward))
    rewards = {REWARD_MODEL: reward, SECOND_JUDGE: judge}
    if run.plan.method.form == "q":
        result = train_on_reward(QLearner(with_reward, head, rewards))
    else:
        result = train_on_reward(ResidualLearner(with_reward, head, rewards))
    return replace(result, held_out_accuracy=accuracy)


def work(run: Run) -> Workload:
    """Return what `train` will do: a fitted reward model scores unfinished replies too."""
    is_partial = run.config.partial_text is not False
    if run.plan.method.form == "q":
        return work_on_reward(run, QLearner, is_partial=is_partial)
    return work_on_reward(run, ResidualLearner, is_partial=is_partial)


def fit_judge(run: Run) -> dict[str, Reward]:
    """Return a reward model of the preferences that a head was fitted to directly, to evaluate the head by.

    It is empty where there are too few preferences.
    """
    examples = preferences(run, run.plan.train.rows)
    if len(examples) < _MIN_EXAMPLES or not _are_usable(examples):
        run.say("  there are too few preferences for a reward model that would score the head's replies")
        return {}
    reward = RewardModel.fit(examples, run.config.seed, run.model)
    _report_accuracy(run, REWARD_MODEL, reward)
    return {REWARD_MODEL: reward}


def preferences(run: Run, rows: Sequence[Row]) -> Preferences:
    """Return rows as pairs of texts, or as labelled texts, cut to the length of generated replies.

    Labelled replies are not paired across prompts: a reward model would learn which topics have good replies.
    """
    if run.plan.source == "pairs":
        return [(_cut(run, row.chosen), _cut(run, row.rejected)) for row in rows if isinstance(row, Pair)]
    return [
        LabelledText("\n".join(message.content for message in row.prompt), _cut(run, row.completion), row.label)
        for row in rows
        if isinstance(row, Labelled)
    ]


def held_out_pairs(run: Run) -> tuple[list[TextPair], bool]:
    """Return held-out pairs of a better and a worse reply, and whether the two answer one prompt.

    Labelled replies are paired within a prompt, good with bad; where no prompt has both, across prompts. That is good
    enough to measure a reward model, not to fit one.
    """
    rows = run.plan.held_out.rows
    if run.plan.source == "pairs":
        return [(_cut(run, row.chosen), _cut(run, row.rejected)) for row in rows if isinstance(row, Pair)], True
    by_prompt: dict[str, dict[bool, list[str]]] = defaultdict(lambda: {True: [], False: []})
    for row in rows:
        if isinstance(row, Labelled):
            by_prompt[prompt_key(row)][row.label].append(_cut(run, row.completion))
    within = [pair for replies in by_prompt.values() for pair in zip(replies[True], replies[False], strict=False)]
    good, bad = ([text for replies in by_prompt.values() for text in replies[label]] for label in (True, False))
    return (within, True) if within else (list(zip(good, bad, strict=False)), False)


def _are_usable(examples: Preferences) -> bool:
    """Return whether there are good and bad replies among the examples."""
    labels = {example.is_good for example in examples if isinstance(example, LabelledText)}
    return not labels or len(labels) == 2


def _cut(run: Run, text: str) -> str:
    tokenizer = run.model.tokenizer
    token_ids = tokenizer(text, add_special_tokens=False).input_ids[: run.config.max_reply_tokens]
    return str(tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))


def _report_accuracy(run: Run, name: str, reward: RewardModel) -> Interval:
    """Log, say and return the share of held-out pairs that a reward model orders correctly."""
    pairs, is_within = held_out_pairs(run)
    accuracy = reward_accuracy(reward, pairs)
    run.log(name, pairs=len(pairs), accuracy=asdict(accuracy))
    which = "held-out pairs" if is_within else "held-out pairs (a good and a bad reply to different prompts)"
    run.say(f"  {name}: orders {shown_accuracy(accuracy)} of {len(pairs)} {which} correctly")
    return accuracy
