"""Explain one reply: which candidates the head rejected, and what was taken instead."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import Any

from typing_extensions import Unpack

from mara_integrations.engine.generation import Generation
from mara_integrations.engine.settings import RequestSettings
from mara_integrations.errors import ConfigError
from mara_integrations.evaluation.marks import Mark, token_marks
from mara_integrations.evaluation.report import stats_line
from mara_integrations.evaluation.text import visible
from mara_integrations.messages import Prompt
from mara_integrations.runtime import MARAEngine

# Colours that are read on white and on black.
_STYLES = {
    "rejected": "color:#d33;text-decoration:line-through",
    "instead": "color:#2a9134",
    "forced": "border-bottom:1px dotted #b8860b",
}
# A notebook stores what a cell shows: a long reply is cut.
_MAX_TOKENS = 2_000


@dataclass(frozen=True, slots=True)
class Explanation:
    """One reply, token by token. In a notebook it is shown with its marks; as text, it is the reply.

    Attributes:
        generation: The reply.
        marks: What the gate did at each token; joined, their texts are the reply's raw text.
    """

    generation: Generation
    marks: tuple[Mark, ...] = field(repr=False)

    def __str__(self) -> str:
        return self.generation.text

    def _repr_html_(self) -> str:
        tokens = "".join(_token(mark) for mark in self.marks[:_MAX_TOKENS])
        more = len(self.marks) - _MAX_TOKENS
        rest = f" … {more} more tokens" if more > 0 else ""
        key = " · ".join(
            (
                _span("struck out", _STYLES["rejected"]) + ": rejected by the head",
                _span("green", _STYLES["instead"]) + ": taken instead",
                _span("dotted", _STYLES["forced"]) + ": taken with no choice left",
                "point at a token for its numbers",
            )
        )
        counts = escape(stats_line(self.generation.stats, len(self.generation.token_ids)))
        return (
            f'<div style="max-width:50em"><div style="white-space:pre-wrap">{tokens}{rest}</div>'
            f'<div style="font-size:85%;opacity:.75;margin-top:.5em">{key}<br>{counts}</div></div>'
        )


def explain(engine: MARAEngine, prompt: Prompt, **settings: Unpack[RequestSettings]) -> Explanation:
    """Generate a reply, and explain it.

    ```python
    from mara_integrations.evaluation.explain import explain

    explain(llm.engine, "Which plan has email support?")
    ```

    Args:
        engine: With a head.
        prompt: As for `MARAEngine.generate`.
        **settings: Settings of this call, as there.

    Raises:
        ConfigError: If there is no head; else as `MARAEngine.generate`.
    """
    settings["trace"] = True
    request = engine.request(prompt, **settings)
    if request.head is None:
        raise ConfigError("without a head there is nothing to explain", hint="give one, as head='heads/brand-voice'")
    generation = engine.generate(request)
    return Explanation(generation, token_marks(engine.model.tokenizer, request, generation))


def _token(mark: Mark) -> str:
    rejected = [each for each in mark.rejected if each.is_by_head]
    struck = "".join(_span(visible(each.text), _STYLES["rejected"], each) for each in rejected)
    style = _STYLES["instead"] if rejected else _STYLES["forced"] if mark.outcome in ("forced", "fallback") else ""
    return struck + _span(visible(mark.text), style, mark)


def _span(text: str, style: str, numbers: Any = None) -> str:
    parts = [f' style="{style}"'] if style else []
    if numbers is not None:
        parts.append(f' title="{escape(_numbers(numbers))}"')
    return f"<span{''.join(parts)}>{escape(text)}</span>" if text else ""


def _numbers(token: Any) -> str:
    asked = "not asked" if token.accept_logit is None else f"accept logit {token.accept_logit:.2f}"
    outcome = f"{token.outcome} · " if isinstance(token, Mark) else "rejected · "
    return f"{outcome}log-probability {token.log_prob:.2f} · {asked}"
