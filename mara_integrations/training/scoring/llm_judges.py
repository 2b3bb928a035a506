"""The LLM judges of a run: what they share, how often they will be asked, and whether they agree with people."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.markup import escape

from mara_integrations.data import Pair
from mara_integrations.evaluation.metrics import wilson
from mara_integrations.rewards import JudgeReward, judges_of, reward_name
from mara_integrations.rewards.judges import Answers, CallBudget, JudgeSession
from mara_integrations.rewards.judges.session import ANSWERS_FILE, judges_folder
from mara_integrations.training.collect.prompts import distinct_prompts
from mara_integrations.training.context import Run

FAILURES_FILE = "judge-failures.jsonl"
_MAX_PAIRS = 50  # of people, that a judge is compared with: enough for an interval of some 0.1 either way


def open_judges(run: Run, *, is_trial: bool = False) -> None:
    """Give all LLM judges of a run one budget, one store of answers and one file of failures.

    Args:
        run: The run.
        is_trial: Write nothing.
    """
    session = JudgeSession(
        answers=Answers(judges_folder() / ANSWERS_FILE, is_read_only=is_trial),
        budget=CallBudget(run.config.max_judge_calls),
        failures=None if is_trial else run.config.output / FAILURES_FILE,
        scope=run.identity.fingerprint,
        say=lambda text: run.say(f"  [yellow]{escape(text)}[/]"),
        stage=run.stage,
    )
    for judge in _judges(run):
        judge.session = session


def check_judges(run: Run) -> None:
    """Let each LLM judge compare two replies, so that a wrong key or a model of no use shows before the work.

    Raises:
        RewardError: If one gives no judgement.
    """
    prompt = [message.as_dict() for message in run.plan.train.rows[0].prompt]
    for judge in _judges(run):
        judge.trial().compare([prompt], ["I don't know."], ["Yes."])


def expected_calls(run: Run) -> dict[str, int]:
    """Return the most calls of each LLM judge, by its name.

    Every reply of the run is judged once at most, and those of the evaluation. Answers that are kept already, and
    rounds that end early, make it less.
    """
    generated = sum(map(len, run.plan.method.work(run).generations))
    evaluated = 2 * min(run.config.eval_prompts, len(distinct_prompts(run, run.plan.prompts[1])))
    pairs = _pairs(run)
    return {
        reward_name(judge): (generated + evaluated) * judge.calls_per_reply + 2 * len(pairs) for judge in _judges(run)
    }


def report_agreement(run: Run) -> dict[str, Any]:
    """Ask LLM judges about preference pairs of the data, and say how often they agree; return it as metrics.

    A tie of the judge counts as half.
    """
    pairs, found = _pairs(run), {}
    for judge in _judges(run) if pairs else ():
        prompts = [_as_trl(pair) for pair in pairs]
        compared = judge.compare(prompts, [pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
        scores = [score for score in compared if score is not None]
        if not scores:
            continue
        share = wilson(round(sum((1.0 + score) / 2.0 for score in scores)), len(scores))
        found[reward_name(judge)] = {"pairs": len(scores), **asdict(share)}
        run.say(
            f"  {escape(reward_name(judge))} agrees with {share.mean:.0%} of {len(scores)} pairs of the data "
            + escape(f"[{share.low:.0%}, {share.high:.0%}]")
            + (" [yellow]not distinguishable from chance[/]" if share.low <= 0.5 else "")
        )
    if found:
        run.log("agreement of judges", **found)
    return {"judge_agreement": found} if found else {}


def _judges(run: Run) -> list[JudgeReward]:
    return list(judges_of(run.plan.reward, *run.plan.judges.values()))


def _pairs(run: Run) -> list[Pair]:
    rows = [row for side in (run.plan.held_out, run.plan.train) for row in side.rows if isinstance(row, Pair)]
    return rows[:_MAX_PAIRS]


def _as_trl(pair: Pair) -> Any:
    return [message.as_dict() for message in pair.prompt]
