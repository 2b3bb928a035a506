"""A grammar as a mask on the logits (xgrammar): what it forbids is no candidate, so the head judges legal ones alone.

Where it leaves one token, that is taken unasked; it moves on only with tokens that the gate took.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mara_integrations.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    import xgrammar

# What closes something open in JSON, or is the shortest value, in the order in which they are tried.
_CLOSERS = ('"', "}", "]", "0", "null", "[", "{", ":", ",")
_WATCHED = 64  # tokens before the end of the budget from which on the way out is looked for
_MARGIN = 16  # tokens kept beside it: the next token may open something more
_LONGEST_WAY_OUT = 500  # steps
# by tokenizer, and by width and end of the models that use it: the compiler, and which tokens hold control characters
_Compilers = dict[tuple[int, str], "tuple[xgrammar.GrammarCompiler, Tensor]"]
_compilers: weakref.WeakKeyDictionary[Any, _Compilers] = weakref.WeakKeyDictionary()


class Grammar:
    """The state of one reply in a grammar.

    A budget is kept for the end: when the tokens left just suffice for the shortest way out, that way is taken.

    Args:
        structural_tag: Of xgrammar, as plain JSON.
        tokenizer: Of the model.
        vocab_size: Width of the logits.
        eos_token_ids: Allowed where the grammar may end.
        budget: Tokens the reply may have.

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
        budget: int,
    ) -> None:
        try:
            import xgrammar
        except ImportError:
            raise MissingExtraError(
                "tools and JSON schemas need the package xgrammar", hint="pip install 'mara-integrations[tools]'"
            ) from None
        stops = sorted(eos_token_ids) or None
        known, key = _compilers.setdefault(tokenizer, {}), (vocab_size, str(stops))
        if key not in known:
            info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size, stop_token_ids=stops)
            known[key] = xgrammar.GrammarCompiler(info), _has_control(info.decoded_vocab)
        compiler, has_control = known[key]
        try:
            compiled = compiler.compile_structural_tag(json.dumps(structural_tag))
        except Exception as error:  # its C++ side raises RuntimeError and its own; all mean a schema it can't express
            reason = str(error).strip().splitlines()[-1]
            raise ConfigError(f"the schema can't be made a grammar: {reason}") from error
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)  # (1, V / 32), int32, on the CPU
        is_free_text = structural_tag["format"]["type"] == "triggered_tags"
        self._forbidden = torch.zeros_like(has_control) if is_free_text else has_control  # (V,)
        self._tokenizer = tokenizer
        self._left = budget
        self._margin = min(_MARGIN, 1 + budget // 8)
        self._watch_from = len(self._way_out() or ()) + _WATCHED

    def mask(self, logits: Tensor) -> None:
        """Set the logits of tokens that may not come next to -inf, in place, shape (V,)."""
        if self._matcher.is_terminated():
            return
        allowed = self._allowed(self._matcher)
        way_out = self._way_out() if self._left <= self._watch_from else None
        if way_out and self._left <= len(way_out) + self._margin and allowed[way_out[0]]:
            allowed = torch.arange(len(allowed)) == way_out[0]
        logits.masked_fill_(~allowed.to(logits.device), -torch.inf)

    def accept(self, token_id: int) -> None:
        """The gate took this token."""
        self._left -= 1
        self._matcher.accept_token(token_id)

    def _allowed(self, matcher: xgrammar.GrammarMatcher) -> Tensor:
        """Which tokens may come next, (V,), on the CPU."""
        self._bitmask.fill_(-1)  # all of them, which it need not say
        matcher.fill_next_token_bitmask(self._bitmask)
        bits = self._bitmask[0][:, None] >> torch.arange(32, dtype=torch.int32)
        return (bits & 1).bool().flatten()[: len(self._forbidden)] & ~self._forbidden

    def _way_out(self) -> list[int] | None:
        """Tokens that complete the reply, few if not the fewest; None where there are too many."""
        matcher, token_ids = self._matcher.fork(), list[int]()
        for _ in range(_LONGEST_WAY_OUT):
            if matcher.is_completed():
                return token_ids
            certain = matcher.find_jump_forward_string()
            step = next((text for text in (certain, *_CLOSERS) if text and matcher.accept_string(text)), None)
            if step is not None:
                token_ids += self._tokenizer(step, add_special_tokens=False)["input_ids"]
            else:  # inside an enum, a pattern, a character of several bytes
                token_ids.append(int(self._allowed(matcher).int().argmax()))
                if not matcher.accept_token(token_ids[-1]):
                    return None
        return None


def _has_control(vocab: list[bytes]) -> Tensor:
    """Which tokens hold a control character other than a newline, (V,): bounded strings let them in, JSON does not."""
    return torch.tensor([any(byte < 32 and byte != 10 for byte in token) for token in vocab])
