"""The training methods by name: what each learns from, what its head looks like, and which one `auto` takes.

Knows no model: a plan is settled with it before anything heavy is imported. The loops themselves are one module each.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from mara_integrations.errors import ConfigError
from mara_integrations.sampling import HeadForm

Source = Literal["pairs", "labels", "reward", "rule"]
SOURCES: dict[Source, str] = {
    "pairs": "preference pairs",
    "labels": "labelled replies",
    "reward": "a reward (--reward module:function)",
    "rule": "forbidden words (--forbid WORD)",
}


@dataclass(frozen=True, slots=True)
class Method:
    """One way to train a head.

    Attributes:
        name: As `--method` names it.
        learns_from: Any of these is enough.
        form: Of the head, see `HeadConfig`.
        other_forms: That the settings may name in its place.
        min_candidates: Of the head where the settings name none.
        keeps_candidates: It learns from every candidate that a gate looks at while replies are written.
        max_replies: That are written to learn from where the settings name no number.
        kl_budget: Nats a token the scale is calibrated to where the settings name none; None leaves it as fitted.
        max_scale: That calibration may choose; None where the scale of f means nothing by itself.
        temperature: Of the replies of the final evaluation.
    """

    name: str
    learns_from: tuple[Source, ...]
    form: HeadForm
    other_forms: tuple[HeadForm, ...] = ()
    min_candidates: int = 1
    keeps_candidates: bool = False
    max_replies: int = 384
    kl_budget: float | None = 0.15
    max_scale: float | None = None
    temperature: float = 1.0


# Why no loss on given replies is offered for the paper's form. Measured on SmolLM2-135M: token labels 0.9 nats a token
# away from the base model, DPO 1.2, against 0.03 for the residual form.
_NO_PRIOR = (
    "a head of the paper's form replaces the base model's probabilities instead of correcting them, and a loss on "
    "given replies leads it far away from every fluent text"
)

# A rule holds or does not, so it knows no budget and is judged greedily, as applications run it; and it has to be able
# to refuse a lone survivor.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("value", ("reward", "pairs", "labels"), "value"),
        Method("dpo", ("pairs",), "residual", max_scale=1.0),  # a likelihood is fitted at scale 1
        Method("kto", ("labels", "pairs"), "residual", max_scale=1.0),
        Method("rloo", ("reward",), "residual", keeps_candidates=True, max_replies=640),
        Method("reward-model", ("pairs", "labels"), "residual", keeps_candidates=True, max_replies=640),
        Method("sac", ("reward",), "residual", ("paper",), keeps_candidates=True, max_replies=1152),
        Method("sac-published", ("reward",), "paper", keeps_candidates=True, max_replies=2048, kl_budget=None),
        Method("rule", ("rule",), "residual", min_candidates=2, kl_budget=None, temperature=0.0),
    )
}

# What `auto` takes: the first source that is there decides. A rule or a reward was asked for by a flag of its own, so
# it goes before the labels that the data may hold.
AUTO: dict[Source, str] = {"rule": "rule", "reward": "rloo", "pairs": "value", "labels": "value"}
# From as many on, a reward model of them teaches more than they do themselves; see cookbook/training_methods.md.
MANY_PAIRS = 300


def choose(
    name: str, given: Collection[Source], form: HeadForm | None = None, *, num_pairs: int = 0
) -> tuple[Method, Source]:
    """The method to use, and what it will learn from.

    Args:
        name: A method's name, or `auto`.
        given: Everything that says what a good reply is.
        form: Of the head, where it is not to be the method's own.
        num_pairs: Preference pairs that are there.

    Raises:
        ConfigError: If nothing does, or nothing that the method can learn from, or not with such a head.
    """
    sources = [source for source in AUTO if source in given]
    if not sources:
        raise ConfigError(
            "prompts alone do not say what a good reply is",
            hint="add --reward module:function or --forbid WORD, or give pairs or labelled replies",
        )
    if name == "auto":
        has_many = sources[0] == "pairs" and num_pairs >= MANY_PAIRS and form in (None, METHODS["reward-model"].form)
        name = "reward-model" if has_many else AUTO[sources[0]]
    method = _with_form(METHODS[name], form)
    for source in sources:
        if source in method.learns_from:
            return method, source
    fitting = [other.name for other in METHODS.values() if set(other.learns_from) & set(sources)]
    raise ConfigError(
        f"method {name!r} needs {' or '.join(SOURCES[source] for source in method.learns_from)}; "
        f"given are {' and '.join(SOURCES[source] for source in sources)}",
        hint=f"methods for those are {', '.join(fitting)}",
    )


def _with_form(method: Method, form: HeadForm | None) -> Method:
    if form is None or form == method.form:
        return method
    if form in method.other_forms:
        return replace(method, form=form, kl_budget=None if form == "paper" else method.kl_budget)
    forms = " or ".join(map(repr, (method.form, *method.other_forms)))
    reason = f": {_NO_PRIOR}" if form == "paper" else ""
    raise ConfigError(
        f"form={form!r} is not allowed: method {method.name!r} trains heads of the form {forms}{reason}",
        hint="leave --form out, or train by --method sac with a reward",
    )
