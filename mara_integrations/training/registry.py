"""The training methods: what each learns from, its form of head, its defaults, and the function that trains it.

Loops are imported when they run: to plan a run, or to refuse it, needs none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Literal, cast

from mara_integrations.errors import ConfigError
from mara_integrations.sampling import HeadForm

if TYPE_CHECKING:
    from mara_integrations.heads.head import MARAHead
    from mara_integrations.training.collect.workload import Workload
    from mara_integrations.training.context import MethodResult, Run

Source = Literal["pairs", "labels", "reward", "rule", "principle", "documents", "teacher"]
SOURCES: dict[Source, str] = {
    "pairs": "preference pairs",
    "labels": "labelled replies",
    "reward": "a reward (--reward module:function)",
    "rule": "a rule (--forbid WHAT)",
    "principle": "a sentence (--principle TEXT)",
    "documents": "questions with documents (a column context)",
    "teacher": "a second model (--teacher MODEL)",
}


# For heads that look at the state after a candidate: the budget alone keeps their replies fluent, where replies of
# Q-heads have bounds on perplexity and variety, too.
AFTERSTATE_BUDGET = 0.15  # nats a token


@dataclass(frozen=True, slots=True)
class Method:
    """One way to train a head.

    Attributes:
        name: Name on the command line.
        loop: Function that fits a head in place, as `module:function`.
        q_loop: The same for heads of the `q` form; None where there is none.
        learns_from: Sources of what a good reply is; any one of them is enough.
        form: Form of the head, see `HeadConfig`.
        other_forms: Forms that the settings may choose instead.
        min_candidates: Default of the setting of that name.
        keeps_candidates: Whether it learns from every candidate that the gate visits, not from taken tokens alone.
        max_replies: Default of the setting of that name.
        kl_budget: Default of the setting of that name; None leaves the head's scale as it was fitted.
        max_scale: Largest scale that calibration may choose; None is no bound.
        temperature: Temperature of the replies of the final evaluation.
    """

    name: str
    loop: str
    q_loop: str | None
    learns_from: tuple[Source, ...]
    form: HeadForm
    other_forms: tuple[HeadForm, ...] = ()
    min_candidates: int = 1
    keeps_candidates: bool = False
    max_replies: int = 384
    kl_budget: float | None = 0.2
    max_scale: float | None = None
    temperature: float = 1.0

    def train(self, run: Run, head: MARAHead) -> MethodResult:
        """Fit a head in place; see the module of the method."""
        module, function = self._loop
        train = getattr(import_module(module), function)
        return cast("Callable[[Run, MARAHead], MethodResult]", train)(run, head)

    def work(self, run: Run) -> Workload:
        """Return what `train` will do, by the function `work` of the method's module."""
        work = import_module(self._loop[0]).work
        return cast("Callable[[Run], Workload]", work)(run)

    @property
    def _loop(self) -> tuple[str, str]:
        loop = self.q_loop if self.form == "q" else self.loop
        assert loop is not None, "the form was checked"
        module, _, function = loop.partition(":")
        return module, function


# Why the paper's form can't be trained on given replies. Measured on SmolLM2-135M: token labels led 0.9 nats a token
# away from the base model, DPO 1.2, against 0.03 for the residual form.
_NO_PRIOR = (
    "a head of the paper's form replaces the base model's probabilities instead of correcting them, and a loss on "
    "given replies leads it far away from every fluent text"
)

_HERE = "mara_integrations.training.methods"
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="value",
            loop=f"{_HERE}.value:train",
            q_loop=f"{_HERE}.q_value:train",
            learns_from=("reward", "pairs", "labels"),
            form="q",
            other_forms=("value",),
        ),
        Method(
            name="dpo",
            loop=f"{_HERE}.preference:train_dpo",
            q_loop=f"{_HERE}.q_preference:train_dpo",
            learns_from=("pairs",),
            form="q",
            other_forms=("residual",),
            max_scale=1.0,  # a likelihood is fitted at scale 1
        ),
        Method(
            name="kto",
            loop=f"{_HERE}.preference:train_kto",
            q_loop=f"{_HERE}.q_preference:train_kto",
            learns_from=("labels", "pairs"),
            form="q",
            other_forms=("residual",),
            max_scale=1.0,
        ),
        Method(
            name="rloo",
            loop=f"{_HERE}.rloo:train",
            q_loop=f"{_HERE}.q_rewards:train",
            learns_from=("reward",),
            form="q",
            keeps_candidates=True,
            max_replies=640,
            other_forms=("residual",),
        ),
        Method(
            name="reward-model",
            loop=f"{_HERE}.reward_model:train",
            q_loop=f"{_HERE}.reward_model:train",
            learns_from=("pairs", "labels"),
            form="q",
            keeps_candidates=True,
            max_replies=640,
            other_forms=("residual",),
        ),
        Method(
            name="sac",
            loop=f"{_HERE}.sac:train",
            q_loop=None,
            learns_from=("reward",),
            form="residual",
            other_forms=("paper",),
            kl_budget=AFTERSTATE_BUDGET,
            keeps_candidates=True,
            max_replies=1152,
        ),
        Method(
            name="rule",
            loop=f"{_HERE}.rule:train",
            q_loop=f"{_HERE}.q_rule:train",
            learns_from=("rule",),
            form="q",
            min_candidates=2,  # so that a lone candidate can be rejected
            kl_budget=None,  # a rule holds or does not
            temperature=0.0,  # as applications run it
            other_forms=("residual",),
        ),
        Method(
            name="principle",
            loop=f"{_HERE}.principle:train",
            q_loop=f"{_HERE}.principle:train",
            learns_from=("principle",),
            form="q",
            max_replies=320,
            kl_budget=0.3,
        ),
        Method(
            name="grounding",
            loop=f"{_HERE}.grounding:train",
            q_loop=f"{_HERE}.grounding:train",
            learns_from=("documents",),
            form="q",
            max_replies=320,
            kl_budget=0.15,
        ),
        Method(
            name="teacher",
            loop=f"{_HERE}.teacher:train",
            q_loop=f"{_HERE}.teacher:train",
            learns_from=("teacher",),
            form="q",
            max_replies=320,
            kl_budget=0.3,
        ),
    )
}

# What `auto` takes: the first source that is given decides. Teachers, principles, rules and rewards have options of
# their own, so they go before the labels that the data may hold.
AUTO: dict[Source, str] = {
    "teacher": "teacher",
    "principle": "principle",
    "rule": "rule",
    "reward": "rloo",
    "pairs": "value",
    "labels": "value",
    "documents": "grounding",
}
# From so many pairs on, a reward model of them trains better heads than they do; see cookbook/training_methods.md.
MANY_PAIRS = 300


def choose(
    name: str, given: Collection[Source], form: HeadForm | None = None, *, num_pairs: int = 0
) -> tuple[Method, Source]:
    """Return the method to use, and the source that it learns from.

    Args:
        name: Name of a method, or `auto`.
        given: Sources that the user gave.
        form: Form of the head; None is the method's own.
        num_pairs: Number of preference pairs in the data.

    Raises:
        ConfigError: If there is no source, none that the method can learn from, or the form is not allowed.
    """
    sources = [source for source in AUTO if source in given]
    if not sources:
        raise ConfigError(
            "prompts alone do not say what a good reply is",
            hint="add --principle TEXT, --teacher MODEL, --reward module:function or --forbid WORD, or give pairs or "
            "labelled replies; --column label=NAME names a column of labels",
        )
    if name == "auto":
        reward_model = METHODS["reward-model"]
        fits = form in (None, reward_model.form, *reward_model.other_forms)
        has_many = sources[0] == "pairs" and num_pairs >= MANY_PAIRS and fits
        name = "reward-model" if has_many else AUTO[sources[0]]
    method = _with_form(METHODS[name], form)
    for source in sources:
        if source in method.learns_from:
            return method, source
    suitable = [other.name for other in METHODS.values() if set(other.learns_from) & set(sources)]
    raise ConfigError(
        f"method {name!r} needs {' or '.join(SOURCES[source] for source in method.learns_from)}; "
        f"given are {' and '.join(SOURCES[source] for source in sources)}",
        hint=f"methods for those are {', '.join(suitable)}",
    )


def _with_form(method: Method, form: HeadForm | None) -> Method:
    if form is None or form == method.form:
        return method
    if form in method.other_forms:
        budget = None if form == "paper" or method.kl_budget is None else AFTERSTATE_BUDGET
        return replace(method, form=form, kl_budget=budget)
    forms = " or ".join(map(repr, (method.form, *method.other_forms)))
    reason = f": {_NO_PRIOR}" if form == "paper" else ""
    raise ConfigError(
        f"form={form!r} is not allowed: method {method.name!r} trains heads of the form {forms}{reason}",
        hint="leave --form out, or train by --method sac with a reward",
    )
