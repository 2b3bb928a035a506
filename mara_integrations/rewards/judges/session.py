"""What the judges of a run share: a store of answers, a budget of calls, and where failures go."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from mara_integrations.files import cache_dir
from mara_integrations.rewards.judges.answers import Answers
from mara_integrations.rewards.judges.calls import CallBudget

ANSWERS_FILE = "answers.sqlite"


def judges_folder() -> Path:
    """Return the folder of answers, and of failures outside of trainings."""
    return cache_dir() / "judges"


def _no_progress(name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda count: None)


@dataclass(slots=True)
class JudgeSession:
    """What the judges of a run share.

    Attributes:
        answers: The answers of earlier calls.
        budget: Calls that they may make.
        failures: File of replies that they could not judge, a JSON object a line; None keeps none.
        scope: Name of the run. Answers of models whose name does not say which weights they have count within it only.
        say: Receives warnings.
        stage: Shows progress; see `Reporter.stage`.
    """

    answers: Answers = field(default_factory=lambda: Answers(judges_folder() / ANSWERS_FILE))
    budget: CallBudget = field(default_factory=CallBudget)
    failures: Path | None = field(default_factory=lambda: judges_folder() / "failures.jsonl")
    scope: str | None = None
    say: Callable[[str], None] = lambda text: warnings.warn(text, stacklevel=2)
    stage: Callable[[str, int], AbstractContextManager[Callable[[int], None]]] = _no_progress
