"""Asks a chat model many questions: several at a time, again where it failed, and no more than a budget allows."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mara_integrations.errors import CallBudgetError
from mara_integrations.rewards.judges.rubric import Question

if TYPE_CHECKING:
    from langchain_core.runnables import Runnable

_LONGEST_WAIT_S = 60.0
_USELESS = (400, 401, 403, 404, 405, 413, 422)  # of HTTP: the same request would fail again


@dataclass(slots=True)
class CallBudget:
    """How many calls judges may make; shared by those of a run.

    Attributes:
        limit: Most calls; None is no limit.
        spent: Calls made so far, those that failed included.
    """

    limit: int | None = None
    spent: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def take(self, count: int) -> int:
        """Take up to `count` calls out of the budget; return how many it had."""
        with self._lock:
            allowed = count if self.limit is None else max(0, min(count, self.limit - self.spent))
            self.spent += allowed
            return allowed


@dataclass(frozen=True, slots=True)
class Calls:
    """How a model is asked.

    Attributes:
        concurrency: Calls at a time.
        attempts: Calls for one question, at most.
        wait_s: Seconds before the second attempt; each further one waits twice as long, and somewhat by chance.
    """

    concurrency: int = 8
    attempts: int = 4
    wait_s: float = 1.0

    def ask(
        self,
        model: Runnable[Any, Any],
        questions: Sequence[Question],
        budget: CallBudget,
        on_answer: Callable[[int, Any], None],
    ) -> dict[int, Exception]:
        """Ask all questions.

        Args:
            model: A chat model, or one that answers in a structure.
            questions: The questions.
            budget: Calls that may be made.
            on_answer: Called with the number of a question and its answer, as soon as it is there.

        Returns:
            Why some questions have no answer, by their number.

        Raises:
            CallBudgetError: If the budget does not suffice; what was answered before has been passed on.
        """
        failures: dict[int, Exception] = {}
        pending = list(range(len(questions)))
        for attempt in range(self.attempts):
            if attempt:
                wait_s = min(_LONGEST_WAIT_S, self.wait_s * 2.0 ** (attempt - 1))
                time.sleep(wait_s * random.uniform(1.0, 1.5))  # callers that failed together come back apart
            allowed = budget.take(len(pending))
            asked, left = pending[:allowed], pending[allowed:]
            for i in asked:
                failures.pop(i, None)
            failures |= self._ask_once(model, questions, asked, on_answer)
            if left:
                raise _spent(budget, len(left) + len(failures))
            pending = [i for i, error in failures.items() if _may_pass(error)]
            if not pending:
                break
        return failures

    def _ask_once(
        self,
        model: Runnable[Any, Any],
        questions: Sequence[Question],
        asked: Sequence[int],
        on_answer: Callable[[int, Any], None],
    ) -> dict[int, Exception]:
        """Ask some of the questions once; return why some of those have no answer."""
        failed: dict[int, Exception] = {}
        # Threads, not an event loop: clients of providers keep connections of the loop that they were first used in.
        results = model.batch_as_completed(
            [list(questions[i]) for i in asked],
            config={"max_concurrency": self.concurrency},
            return_exceptions=True,
        )
        for place, result in results:
            if isinstance(result, Exception):
                failed[asked[place]] = result
            else:
                on_answer(asked[place], result)
        return failed


def _may_pass(error: Exception) -> bool:
    """Whether the same call may succeed a little later."""
    status = getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status not in _USELESS and not isinstance(error, TypeError | ValueError | NotImplementedError)


def _spent(budget: CallBudget, count: int) -> CallBudgetError:
    return CallBudgetError(
        f"judges have made {budget.spent} calls, as many as max_judge_calls={budget.limit} allows, and {count} "
        "judgements are still to come",
        hint="nothing is lost: the same command goes on from here, with as many calls again; --max-judge-calls "
        "raises it",
    )
