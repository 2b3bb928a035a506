"""A grammar as a mask on the logits (xgrammar): the head judges only tokens that it allows.

If it allows a single token, that token is taken without asking the head. JSON is written in one way,
`{"a": 1, "b": [2, 3]}`, so that all of it but the values is certain: such text costs no forward a token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mara_integrations.engine.grammar_compiler import GrammarCompiler
from mara_integrations.engine.request import Constraint

if TYPE_CHECKING:
    import xgrammar

# How far ahead certain text is looked for at one position: more is looked for when that has been written.
LOOK_AHEAD = 256  # characters


class Grammar(Constraint):
    """The state of one reply in a grammar.

    It says what may come next, and nothing about how long a reply may be: one that `max_tokens` cuts stays cut.

    Args:
        structural_tag: A structural tag of xgrammar, as plain JSON.
        tokenizer: The model's tokenizer.
        vocab_size: Width of the logits.
        eos_token_ids: Tokens that are allowed where the grammar may end.

    Raises:
        ConfigError: If the grammar can't be compiled.
        MissingExtraError: If xgrammar is absent.
    """

    def __init__(
        self,
        structural_tag: Mapping[str, Any],
        *,
        tokenizer: Any,
        vocab_size: int,
        eos_token_ids: Collection[int],
    ) -> None:
        self._vocabulary = GrammarCompiler.of(tokenizer, vocab_size, eos_token_ids)
        compiled = self._vocabulary.compile(structural_tag)
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._tokenizer = tokenizer
        self._certain: list[int] | None = None  # None: not looked for yet

    def mask(self, logits: Tensor) -> None:
        """Set the logits of tokens that may not come next to -inf, in place, shape (V,)."""
        if self._matcher.is_terminated():
            return
        if certain := self.certain():
            allowed = torch.arange(len(logits)) == certain[0]
        else:
            allowed = self._vocabulary.allowed(self._matcher)
        logits.masked_fill_(~allowed.to(logits.device), -torch.inf)

    def accept(self, token_id: int) -> None:
        """Advance by the token that the gate took."""
        self._matcher.accept_token(token_id)
        rest = self._certain[1:] if self._certain and self._certain[0] == token_id else []
        self._certain = rest or None

    def allowed_after(self, token_id: int) -> Tensor:
        """Return which tokens may follow one that may come next, (V,), on the CPU."""
        matcher = self._matcher.fork()
        matcher.accept_token(token_id)
        if matcher.is_terminated():
            return torch.zeros(len(self._vocabulary.texts), dtype=torch.bool)
        return self._vocabulary.allowed(matcher)

    def certain(self) -> list[int]:
        """Tokens of the text that must come next, as the tokenizer writes it; up to where one may go beyond it.

        Its work is bounded: it looks `LOOK_AHEAD` characters ahead, and at no text twice.
        """
        if self._certain is None:
            self._certain = self._look_ahead()
        return list(self._certain)

    def _look_ahead(self) -> list[int]:
        text = _certain_text(self._matcher)[:LOOK_AHEAD]
        left, certain, matcher, vocabulary = len(text.encode()), list[int](), self._matcher.fork(), self._vocabulary
        for token_id in self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else ():
            if left < vocabulary.longest and int(vocabulary.sizes[vocabulary.allowed(matcher)].max()) > left:
                break
            if not matcher.accept_token(token_id):  # some tokenizers put a space before every text
                break
            certain.append(token_id)
            left -= len(vocabulary.texts[token_id])
        return certain


def _certain_text(matcher: xgrammar.GrammarMatcher) -> str:
    try:
        return matcher.find_jump_forward_string()
    except UnicodeDecodeError:  # the rest of a character
        return ""
