"""A chat model as a reward: which question is asked of each reply, and what its score is."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from mara_integrations.errors import RewardError
from mara_integrations.rewards.combined import CombinedReward
from mara_integrations.rewards.judges.asking import JudgeModel
from mara_integrations.rewards.judges.calls import Calls
from mara_integrations.rewards.judges.models import (
    LOCAL_PREFIX,
    MODEL_ARGUMENTS,
    as_chat_model,
    described,
    open_model,
    shown_name,
    structured,
)
from mara_integrations.rewards.judges.rubric import (
    DEFAULT_RUBRIC,
    Mode,
    Question,
    answer_schema,
    checked_rubric,
    comparing_question,
    read_rubric,
    scoring_question,
)
from mara_integrations.rewards.judges.session import JudgeSession
from mara_integrations.rewards.protocol import Reward, reply_text
from mara_integrations.rewards.scoring import Scores


class JudgeReward:
    """A chat model that scores replies by a rubric, or compares them.

    In mode `score`, a reply gets 0 to 10. In mode `pairs`, it is compared with another reply to the same prompt, in
    both orders, and gets 1 where it is better, -1 where it is worse, 0 for a tie, and 0.5 or -0.5 where only one order
    decides. The other reply is that of the column `reference`; without one, the first reply to the prompt that this
    judge sees, which in a training is one of the base model.

    A reply that the model gives no answer for, or none that can be read, gets None, and is written to the file of
    failures.

    Args:
        model: `provider:model` as `init_chat_model` of LangChain has it, `mara:` and a model of ours, or a chat model.
        rubric: What a good reply is; None is `DEFAULT_RUBRIC`.
        mode: `score` or `pairs`.
        is_structured: Hold the model to a JSON schema instead of reading its answer; then it gives no reason first.
        calls: How the model is asked.
        name: Says which model an object is. Then its answers are kept for other runs, too.
        **arguments: Arguments of a named model; see `MODEL_ARGUMENTS`.

    Raises:
        RewardError: If the model can't be opened, or an argument is not allowed.
        MissingExtraError: If a package that it needs is not installed.
    """

    takes_partial_text = False  # a judge reads whole replies, and every call costs
    limits_its_time = True  # a batch takes as long as its calls, each of which has a limit of its own

    def __init__(
        self,
        model: Any,
        *,
        rubric: str | None = None,
        mode: Mode = "score",
        is_structured: bool = False,
        calls: Calls | None = None,
        name: str | None = None,
        **arguments: Any,
    ) -> None:
        if mode not in ("score", "pairs"):
            raise RewardError(f"judge {model!r:.80}: mode={mode} is not allowed", hint="score or pairs")
        self._source = model if isinstance(model, str) else None
        if self._source is None and arguments:
            raise RewardError(
                f"judge: {next(iter(arguments))} is given beside a chat model", hint="set it in the model itself"
            )
        opened = open_model(model, arguments) if self._source is not None else as_chat_model(model)
        self.name = name or self._source or shown_name(opened)
        self._is_known = name is not None or (self._source is not None and not self.name.startswith(LOCAL_PREFIX))
        self._identity = {"model": self.name, **arguments} if self._is_known else {**described(opened), **arguments}
        asked = structured(opened, answer_schema(mode), self.name) if is_structured else opened
        self._model = JudgeModel(asked, self.name, mode, calls or Calls())
        self._rubric = DEFAULT_RUBRIC if rubric is None else checked_rubric(rubric, "of the judge")
        self.mode, self._is_structured, self._arguments = mode, is_structured, arguments
        self._opponents: dict[str, str] = {}
        self.session = JudgeSession()
        self.__name__ = self._model.title

    @classmethod
    def of(cls, source: str, arguments: Mapping[str, str]) -> JudgeReward:
        """Return a judge from the arguments of a command line.

        Raises:
            RewardError: If one is unknown or not allowed, or the rubric can't be read; see the class.
            MissingExtraError: See the class.
        """
        if not source:
            raise RewardError("reward 'llm:' names no model", hint="for example llm:openai:gpt-5-mini")
        given = dict(arguments)
        rubric = read_rubric(given.pop("rubric")) if "rubric" in given else None
        mode = cast(Mode, given.pop("mode", "score"))
        flag = given.pop("structured", "no")
        if flag not in ("yes", "no"):
            raise RewardError(f"judge {source!r}: structured={flag} is not allowed", hint="yes or no")
        calls = Calls()
        for name in ("concurrency", "attempts"):
            if name in given:
                calls = replace(calls, **{name: _number(source, name, given.pop(name), int)})
        values = {}
        for name, value in given.items():
            if name not in MODEL_ARGUMENTS:
                known = ("rubric", "mode", "structured", "concurrency", "attempts", *MODEL_ARGUMENTS)
                raise RewardError(
                    f"judge {source!r}: {name!r} is not an argument", hint=f"arguments are {', '.join(known)}"
                )
            kind = MODEL_ARGUMENTS[name]
            values[name] = value if kind is str else _number(source, name, value, kind)
        return cls(source, rubric=rubric, mode=mode, is_structured=flag == "yes", calls=calls, **values)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> JudgeReward:
        """Build the judge that `spec` described.

        Raises:
            RewardError: If it was a chat model object.
            KeyError: If a field is absent.
        """
        if spec["source"] is None:
            raise RewardError(
                f"judge {spec['name']!r} was given as an object, and can't be built again",
                hint="give it again: llm_judge(model, rubric=...)",
            )
        mode = cast(Mode, spec["mode"])
        settings = {"rubric": spec["rubric"], "mode": mode, "is_structured": spec["structured"]}
        return cls(spec["source"], **settings, **spec["arguments"])

    def spec(self) -> dict[str, Any]:
        """Return the JSON description that `reward_from_spec` builds an equal judge from; it holds the rubric."""
        return {
            "kind": "llm",
            "name": self.name,
            "source": self._source,
            "mode": self.mode,
            "structured": self._is_structured,
            "rubric": self._rubric,
            "arguments": self._arguments,
        }

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides its judgements: the model, the rubric and the wording of the question."""
        return {"spec": self.spec(), "identity": self._identity, "wording": self._key(self._probe())}

    @property
    def calls_per_reply(self) -> int:
        """Calls that the judgement of a new reply takes."""
        return 1 if self.mode == "score" else 2

    def trial(self) -> JudgeReward:
        """Return a copy to try the judge with: what it sees is not compared with later."""
        tried = copy.copy(self)
        tried._opponents, tried._model = {}, replace(self._model)
        tried.session = replace(self.session, scope="trial")
        return tried

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], reference: Sequence[Any] | None = None, **_: Any
    ) -> Scores:
        """Return one score a completion; see `Reward`.

        Raises:
            RewardError: If the model answers nothing at all.
            CallBudgetError: If no more calls may be made; what was answered is kept.
        """
        replies = [reply_text(completion) for completion in completions]
        if self.mode == "score":
            questions = [self._scoring(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
            return self._judged(questions, list(zip(prompts, replies, strict=True)))
        others = self._others(prompts, replies, reference)
        return self.compare(prompts, replies, others)

    def compare(self, prompts: Sequence[Any], replies: Sequence[str], others: Sequence[str]) -> Scores:
        """Return how each reply compares with another one to the same prompt, -1 to 1, by both orders.

        Equal texts are a tie, and cost nothing. A judge of mode `score` scores both, and the difference counts: -1, 0
        or 1.

        Raises:
            RewardError: See `__call__`.
            CallBudgetError: See `__call__`.
        """
        if self.mode == "score":
            both = self(prompts=[*prompts, *prompts], completions=[*replies, *others])
            pairs = zip(both[: len(replies)], both[len(replies) :], strict=True)
            return [None if a is None or b is None else float((a > b) - (a < b)) for a, b in pairs]
        rows = list(zip(prompts, replies, others, strict=True))
        differ = [i for i, (_, reply, other) in enumerate(rows) if reply != other]
        questions, subjects = [], []
        for i in differ:
            prompt, reply, other = rows[i]
            questions += [self._comparing(prompt, reply, other), self._comparing(prompt, other, reply)]
            subjects += [(prompt, reply)] * 2
        said = self._judged(questions, subjects)
        scores: Scores = [0.0] * len(rows)
        for i, as_a, as_b in zip(differ, said[::2], said[1::2], strict=True):
            scores[i] = None if as_a is None or as_b is None else (as_a - as_b) / 2
        return scores

    def _others(self, prompts: Sequence[Any], replies: Sequence[str], reference: Sequence[Any] | None) -> list[str]:
        """Return the reply that each one is compared with."""
        others = []
        for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
            if reference is not None and reference[i]:
                others.append(reply_text(reference[i]))
                continue
            key = self._key(("opponent", json.dumps(prompt, sort_keys=True)), by_run=True)
            if key not in self._opponents:
                kept = self.session.answers.get([key]) if self.session.scope is not None else {}
                self._opponents[key] = kept.get(key, reply)
                if not kept and self.session.scope is not None:
                    self.session.answers.put(key, reply)
            others.append(self._opponents[key])
        return others

    def _judged(self, questions: Sequence[Question], subjects: Sequence[tuple[Any, str]]) -> Scores:
        """Return the judgement of each question.

        Args:
            questions: The questions.
            subjects: The prompt and the reply that each is about.
        """
        keys = [self._key(question) for question in questions]
        by_key = dict(zip(keys, questions, strict=True))
        found = self._model.ask(by_key, dict(zip(keys, subjects, strict=True)), self._key, self.session)
        return [found[key] for key in keys]

    def _scoring(self, prompt: Any, reply: str) -> Question:
        return scoring_question(self._rubric, prompt, reply, structured=self._is_structured)

    def _comparing(self, prompt: Any, reply: str, other: str) -> Question:
        return comparing_question(self._rubric, prompt, (reply, other), structured=self._is_structured)

    def _probe(self) -> Question:
        return self._scoring("?", "?") if self.mode == "score" else self._comparing("?", "?", "!")

    def _key(self, content: Any, *, by_run: bool = False) -> str:
        """Return the key of an answer: a hash of the model and of all that it is shown."""
        scope = self.session.scope if by_run or not self._is_known else None
        whole = [self._identity, self._is_structured, scope, content]
        return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode(errors="surrogatepass")).hexdigest()


def llm_judge(
    model: Any,
    rubric: str | Path | None = None,
    *,
    mode: Mode = "score",
    structured: bool = False,
    concurrency: int = 8,
    attempts: int = 4,
    name: str | None = None,
) -> JudgeReward:
    """Return a reward that asks a chat model.

    Args:
        model: A chat model of LangChain, a `MARALLM`, or a name such as `openai:gpt-5-mini` or `mara:smollm2`.
        rubric: What a good reply is, as a text, or as the `Path` of a file; None is `DEFAULT_RUBRIC`.
        mode: `score` gives 0 to 10; `pairs` compares with another reply to the same prompt, -1 to 1.
        structured: Hold the model to a JSON schema instead of reading its answer.
        concurrency: Calls at a time.
        attempts: Calls for one judgement, at most, where calls fail.
        name: Says which model an object is, so that its judgements are kept for other runs, too.

    Raises:
        RewardError: If the model can't be opened, the rubric can't be read, or an argument is not allowed.
        MissingExtraError: If a package that it needs is not installed.

    Example:
        >>> train(config, reward=llm_judge(ChatOpenAI(model="gpt-5-mini"), rubric=Path("rubric.md")))
    """
    for argument, value in (("concurrency", concurrency), ("attempts", attempts)):
        if value < 1:
            raise RewardError(f"judge {model!r:.80}: {argument}={value} is not allowed", hint="at least 1")
    text = read_rubric(rubric) if isinstance(rubric, Path) else rubric
    calls = Calls(concurrency, attempts)
    return JudgeReward(model, rubric=text, mode=mode, is_structured=structured, calls=calls, name=name)


def judges_of(*rewards: Reward | None) -> Iterator[JudgeReward]:
    """Yield the judges among rewards and the parts of sums."""
    for reward in rewards:
        if isinstance(reward, JudgeReward):
            yield reward
        elif isinstance(reward, CombinedReward):
            yield from judges_of(*reward.parts.values())


def trial_of(reward: Reward) -> Reward:
    """Return a reward to try: a judge of it forgets what it sees, everything else is as it was."""
    if isinstance(reward, CombinedReward):
        return reward.replaced(trial_of)
    return reward.trial() if isinstance(reward, JudgeReward) else reward


def _number(source: str, name: str, value: str, kind: type) -> Any:
    try:
        number = kind(value)
    except ValueError:
        number = -1
    if number < (1 if name in ("concurrency", "attempts", "max_tokens") else 0):
        raise RewardError(f"judge {source!r}: {name}={value} is not allowed", hint="a number is needed")
    return number
