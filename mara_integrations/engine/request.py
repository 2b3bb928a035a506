"""A generation request: prompt, settings, head, and the objects that read or restrict its reply."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from mara_integrations.heads.compose import Head, afterstate_parts
from mara_integrations.replies.reader import ReplyReader
from mara_integrations.sampling import GateParams, SamplingParams


class Constraint(Protocol):
    """Restricts a reply token by token."""

    def mask(self, logits: Tensor) -> None:
        """Set the logits of tokens that may not come next to -inf, in place, shape (V,)."""

    def refuses(self, token_id: int) -> bool:
        """Return whether a token that `mask` left may not come next; called for the token that the gate would take."""
        return False

    def mask_refused(self, logits: Tensor) -> None:
        """Set the logits of all tokens that `refuses` names to -inf, in place, shape (V,)."""
        return None

    def accept(self, token_id: int) -> None:
        """Advance by the token that the gate took."""

    def certain(self) -> Seq[int]:
        """Return the tokens that must come next, as far as they are known ahead."""
        return ()


class TextFollower(Protocol):
    """Receives a reply token by token, but for its end-of-sequence token, and may end it; `TextStream` is one."""

    text: str
    stopped: bool

    def push(self, token_id: int) -> object:
        """Receive a token; afterwards, `stopped` says whether it was the last."""

    def finish(self) -> object:
        """Receive the end of the reply."""


@dataclass(slots=True, eq=False)
class Request:
    """A generation request.

    Attributes:
        prompt_ids: Tokens of the prompt, at least one.
        head: None for the base model.
        eos_token_ids: Tokens that end the reply; the one that did is part of it.
        text: Follows the reply's text, and ends it at a stop string; None where only tokens matter.
        reader: Separates thoughts, answer and calls in that text; None leaves it whole.
        constraint: Masks the logits before candidates are chosen; the head judges what is left.
        keep_states: Keep the hidden state of the last prompt token and of every reply token, for training.
        keep_positions: Keep what the head was shown at each position it judged, for training.
        top_logprobs: Alternatives to tell at each position, by an engine that has no trace; None tells none.
    """

    prompt_ids: Seq[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    gate: GateParams = field(default_factory=GateParams)
    head: Head | None = None
    eos_token_ids: frozenset[int] = frozenset()
    text: TextFollower | None = None
    reader: ReplyReader | None = None
    constraint: Constraint | None = None
    keep_states: bool = False
    keep_positions: bool = False
    top_logprobs: int | None = None

    @property
    def feeds_candidates(self) -> bool:
        """Whether candidates have to be fed to be judged: the head has parts that score the states after them."""
        return self.head is not None and self.gate.strength > 0 and bool(afterstate_parts(self.head))
