"""Keep words and patterns out of a reply: the gate takes no token that would complete one.

Exact over the borders of tokens, and no more than that: what begins like a forbidden word stays possible, and a reply
without one is the reply that the model would have written anyway. A token is judged when it is about to be taken; if it
is refused, the position is decided again without all tokens that are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from mara_integrations.engine.grammar import Grammar
from mara_integrations.engine.refusals import Refusals
from mara_integrations.engine.request import Constraint


class NeverConstraint(Constraint):
    """The state of one reply that must not contain some words or patterns, and may have to follow a grammar.

    Args:
        refusals: Which tokens complete them, for the model's vocabulary.
        max_new_tokens: Most tokens of the reply: its last token does not leave a forbidden word as its end.
        grammar: Grammar that the reply must follow too. A token is also refused if it leaves a forbidden word where the
            grammar allows no letter next, as at the end of a string of bounded length.
    """

    def __init__(self, refusals: Refusals, max_new_tokens: int, grammar: Grammar | None = None) -> None:
        self._refusals, self._grammar = refusals, grammar
        self._num_left = max_new_tokens
        self._state, self._unfinished = refusals.start, b""
        self._dead_ends: list[int] = []  # tokens of this position that the grammar lets nothing allowed follow

    @override
    def mask(self, logits: Tensor) -> None:
        if self._grammar is not None:
            self._grammar.mask(logits)

    @override
    def refuses(self, token_id: int) -> bool:
        if self._refusals.refuses(self._state, self._unfinished, token_id, is_last=self._num_left == 1):
            return True
        if self._is_dead_end(token_id):
            self._dead_ends.append(token_id)
            return True
        return False

    def _is_dead_end(self, token_id: int) -> bool:
        after = self._refusals.after(self._state, self._unfinished, token_id)
        if self._grammar is None or after is None or not self._refusals.is_pending(after[0]):
            return False
        allowed = self._grammar.allowed_after(token_id)
        allowed[self._refusals.token_ids(*after, is_last=self._num_left == 2)] = False
        return not bool(allowed.any())

    @override
    def mask_refused(self, logits: Tensor) -> None:
        refused = self._refusals.token_ids(self._state, self._unfinished, is_last=self._num_left == 1)
        logits[refused.to(logits.device)] = -torch.inf
        logits[self._dead_ends] = -torch.inf

    @override
    def accept(self, token_id: int) -> None:
        if self._grammar is not None:
            self._grammar.accept(token_id)
        after = self._refusals.after(self._state, self._unfinished, token_id)
        assert after is not None, "a token that completes what is forbidden is refused"
        self._state, self._unfinished = after
        self._num_left -= 1
        self._dead_ends = []

    @override
    def certain(self) -> Sequence[int]:
        """Return the tokens that the grammar leaves no choice in, up to a forbidden word, where no token is allowed."""
        allowed: list[int] = []
        state, unfinished = self._state, self._unfinished
        for token_id in self._grammar.certain() if self._grammar is not None else ():
            is_last = self._num_left - len(allowed) == 1
            after = self._refusals.after(state, unfinished, token_id)
            if after is None or self._refusals.refuses(state, unfinished, token_id, is_last=is_last):
                break
            allowed.append(token_id)
            state, unfinished = after
        return allowed
