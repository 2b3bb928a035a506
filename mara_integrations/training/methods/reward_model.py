"""The `reward-model` method: fit a small reward model to preferences, then teach the gate by it with `rloo`.

Given replies are other people's: steering straight from them has to bridge that. A reward model judges what the model
itself writes. It is the sum of two linear ones, of a reply's words and of its tokens' embeddings, so that it takes
parts of replies and costs next to nothing. A second one, fitted to pairs that the first never saw, judges the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from rich.markup import escape

from mara_integrations.data import Dataset, Pair, Row
from mara_integrations.data.rows import prompt_key
from mara_integrations.errors import DataError
from mara_integrations.evaluation.metrics import Interval, wilson
from mara_integrations.heads.head import MARAHead
from mara_integrations.rewards import Reward
from mara_integrations.training import gather
from mara_integrations.training.context import Learned, Run
from mara_integrations.training.methods import rloo
from mara_integrations.training.scoring.fitted_reward import Preference, RewardModel

_JUDGE_SHARE = 0.3  # of the prompts: what the second model is fitted to, and the first never sees
_MIN_PAIRS = 20


def learn(run: Run, head: MARAHead) -> Learned:
    """Fit both reward models, report how well they order held-out pairs, and teach the gate by the first."""
    rows = run.plan.train.rows
    keys = sorted({prompt_key(row) for row in rows})
    judged = set(run.random().sample(keys, round(_JUDGE_SHARE * len(keys))))
    sides = [
        preferences(run, _with_rows(run.plan.train, [row for row in rows if (prompt_key(row) in judged) is is_judge]))
        for is_judge in (False, True)
    ]
    held_out = preferences(run, run.plan.held_out)
    if min(map(len, sides)) < _MIN_PAIRS:
        raise DataError(
            f"{sum(map(len, sides))} pairs are too few for a reward model and a judge of it",
            hint=f"some {4 * _MIN_PAIRS} are needed at least; `--method value` makes do with fewer",
        )
    reward, judge = (RewardModel.fit(side, run.config.seed, run.model) for side in sides)
    accuracy = _report_ordering(run, "reward model", reward, held_out)
    _report_ordering(run, "second judge", judge, held_out)
    taught = replace(run, plan=replace(run.plan, reward=reward))
    return replace(
        rloo.teach(taught, head, {"reward model": reward, "second judge": judge}), held_out_accuracy=accuracy
    )


def judge_of_preferences(run: Run) -> dict[str, Reward]:
    """For heads that were fitted to given replies directly: a reward model of them judges what the head writes.

    By name; none where there are too few to fit one to.
    """
    pairs, held_out = preferences(run, run.plan.train), preferences(run, run.plan.held_out)
    if len(pairs) < _MIN_PAIRS or not held_out:
        run.say("  too few preferences for a reward model that would judge the head's own replies")
        return {}
    reward = RewardModel.fit(pairs, run.config.seed, run.model)
    _report_ordering(run, "reward model", reward, held_out)
    return {"reward model": reward}


def _report_ordering(run: Run, name: str, reward: RewardModel, held_out: Sequence[Preference]) -> Interval:
    """Log and say how many held-out pairs it orders rightly."""
    found = ordering(reward, held_out)
    run.log(name, pairs=len(held_out), accuracy=asdict(found))
    doubt = " [yellow]not distinguishable from chance[/]" if found.low <= 0.5 else ""
    interval = escape(f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]")
    run.say(f"  {name}: {interval} of {len(held_out)} held-out pairs ordered rightly{doubt}")
    return found


def preferences(run: Run, data: Dataset) -> list[Preference]:
    """Better and worse replies: the pairs, or a reply labelled good with one labelled bad; cut as replies will be."""

    def cut(text: str) -> str:
        tokenizer = run.model.tokenizer
        token_ids = tokenizer(text, add_special_tokens=False).input_ids[: run.config.max_reply_tokens]
        return str(tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))

    if run.plan.source == "pairs":
        return [(cut(row.chosen), cut(row.rejected)) for row in data.rows if isinstance(row, Pair)]
    texts, labels = gather.written_replies(run, data)
    good, bad = ([cut(text) for (_, _, text), label in zip(texts, labels, strict=True) if label == y] for y in (1, 0))
    count = max(len(good), len(bad)) if good and bad else 0
    return [(good[i % len(good)], bad[i % len(bad)]) for i in range(count)]


def _with_rows(data: Dataset, rows: Sequence[Row]) -> Dataset:
    """The same data set with some of its rows."""
    return Dataset(data.kind, tuple(rows), data.path, data.form)


def ordering(reward: Callable[..., list[float]], pairs: Sequence[Preference]) -> Interval:
    """Share of pairs that a reward orders rightly, ties counted as wrong."""
    better, worse = (reward([pair[i] for pair in pairs]) for i in (0, 1))
    return wilson(sum(b > w for b, w in zip(better, worse, strict=True)), len(pairs))
