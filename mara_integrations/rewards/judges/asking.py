"""Asks a judge's model, keeps its answers, asks again where one can't be read, and reports what fails."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mara_integrations.errors import RewardError, in_one_line
from mara_integrations.files import append_line
from mara_integrations.rewards.judges.calls import Calls
from mara_integrations.rewards.judges.models import answer_text
from mara_integrations.rewards.judges.rubric import Mode, Question, read_answer, reminding_question
from mara_integrations.rewards.judges.session import JudgeSession

if TYPE_CHECKING:
    from langchain_core.runnables import Runnable

_ENOUGH = 8  # questions of one batch; if a judge answers none of so many, it is not by chance


@dataclass(slots=True)
class JudgeModel:
    """A model that answers the questions of one mode.

    Attributes:
        model: A chat model, or one that answers in a structure.
        name: Its name in messages.
        mode: Kind of its answers.
        calls: How it is asked.
        num_read: Number of its answers so far that could be read.
    """

    model: Runnable[Any, Any]
    name: str
    mode: Mode
    calls: Calls
    num_read: int = 0

    @property
    def title(self) -> str:
        """Name of the judge, with its mode."""
        return f"judge {self.name}{' (pairs)' if self.mode == 'pairs' else ''}"

    def ask(
        self,
        questions: Mapping[str, Question],
        subjects: Mapping[str, tuple[Any, str]],
        key_of: Callable[[Question], str],
        session: JudgeSession,
    ) -> dict[str, float | None]:
        """Return the judgement of each question, by key; None where there is none, which the user is told.

        Args:
            questions: The questions, by key.
            subjects: The prompt and the reply that each question is about, by the same keys.
            key_of: Key that the answer to a question is stored under.
            session: What the judges of the run share.

        Raises:
            RewardError: If nothing could be judged so far, or nothing of many.
            CallBudgetError: If no more calls may be made; what was answered is kept.
        """
        answers, errors = self._answers(questions, session)
        values = {key: read_answer(answer, self.mode) for key, answer in answers.items()}
        reminders = {
            key: reminding_question(questions[key], answers[key], self.mode)
            for key, value in values.items()
            if value is None
        }
        reminder_keys = {key: key_of(question) for key, question in reminders.items()}
        more, more_errors = self._answers({reminder_keys[key]: each for key, each in reminders.items()}, session)
        for key, reminder_key in reminder_keys.items():
            if reminder_key in more:
                values[key] = read_answer(more[reminder_key], self.mode)
            else:
                errors[key] = more_errors[reminder_key]
        reasons = {
            key: in_one_line(errors[key]) if key in errors else f"no judgement in {answers[key]!r:.200}"
            for key in questions
            if values.get(key) is None
        }
        self.num_read += len(questions) - len(reasons)
        if reasons:
            self._report(reasons, subjects, len(questions), session)
        return {key: values.get(key) for key in questions}

    def _answers(
        self, questions: Mapping[str, Question], session: JudgeSession
    ) -> tuple[dict[str, str], dict[str, Exception]]:
        """Return the answers by key, from disk or from the model, and why some are missing."""
        answers = session.answers.get(list(questions))
        missing = [key for key in questions if key not in answers]
        if not missing:
            return answers, {}
        with session.stage(self.title, len(missing)) as advance:

            def keep(index: int, answer: Any) -> None:
                answers[missing[index]] = text = answer_text(answer)
                session.answers.put(missing[index], text)
                advance(1)

            failed = self.calls.ask(self.model, [questions[key] for key in missing], session.budget, keep)
        return answers, {missing[index]: error for index, error in failed.items()}

    def _report(
        self,
        reasons: Mapping[str, str],
        subjects: Mapping[str, tuple[Any, str]],
        num_asked: int,
        session: JudgeSession,
    ) -> None:
        """Write failures to their file, and tell the user; see `ask` for the errors.

        Args:
            reasons: Why a question has no judgement, by its key.
            subjects: The prompt and the reply that it is about, by the same key.
            num_asked: Number of questions of the batch.
            session: What the judges of the run share.
        """
        where = ""
        if session.failures is not None:
            where = f"; they are in {session.failures}"
            for key, reason in reasons.items():
                prompt, reply = subjects[key]
                line = {"judge": self.name, "reason": reason, "prompt": prompt, "reply": reply}
                append_line(session.failures, json.dumps(line, ensure_ascii=False, default=str))
        first = next(iter(reasons.values()))
        if not self.num_read or len(reasons) == num_asked >= _ENOUGH:
            raise RewardError(
                f"judge {self.name!r} judged none of {len(reasons)} replies; the first: {first}",
                hint=f"check its key and address, or try a larger model or structured=yes{where}",
            )
        session.say(
            f"judge {self.name}: {len(reasons)} judgements are missing, and count as no opinion{where}; the first: "
            f"{first}"
        )
