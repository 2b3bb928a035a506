"""Words that a reply must not contain: a token that would complete one is not taken.

Exact over the borders of tokens, and no more than that: what begins like a forbidden word stays possible, and a reply
without one is the reply that the model would have written anyway. A token is judged when it is about to be taken; if it
is refused, the position is decided again without all tokens that are.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Sequence

import torch
from cachetools import LRUCache
from torch import Tensor
from typing_extensions import override

from mara_integrations.engine.grammar import Grammar
from mara_integrations.engine.request import Constraint
from mara_integrations.engine.token_texts import TokenTexts, may_become_letter, read_bytes
from mara_integrations.engine.word_automaton import START, State, WordAutomaton
from mara_integrations.rewards.words import ForbiddenWords, is_in_word

_UNREADABLE = "\ufffd"  # stands for bytes that are not a character
_MAX_MASKS = 2048  # kept for each set of words


class Refusals:
    """The tokens that complete a forbidden word in each state of the text; found once a state.

    Args:
        tokens: The vocabulary.
        words: The words.
        stop: Strings that end a reply and are cut off.
        eos_token_ids: Tokens that end a reply.
    """

    def __init__(
        self, tokens: TokenTexts, words: ForbiddenWords, stop: Sequence[str], eos_token_ids: Collection[int]
    ) -> None:
        self._tokens, self._automaton = tokens, WordAutomaton(words, stop)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._edge = frozenset(i for i, first in tokens.first_folded() if not is_in_word(first))
        self._ids: LRUCache[tuple[State, bytes, bool], Tensor] = LRUCache(_MAX_MASKS)
        self._lock = threading.Lock()

    @classmethod
    def of(
        cls, tokens: TokenTexts, words: ForbiddenWords, stop: Sequence[str], eos_token_ids: Collection[int]
    ) -> Refusals:
        """Return the one object of a vocabulary and these words."""
        key = (words.folded, tuple(stop), frozenset(eos_token_ids))
        with tokens.lock:
            if key not in tokens.kept:
                tokens.kept[key] = cls(tokens, words, stop, eos_token_ids)
            found: Refusals = tokens.kept[key]
            return found

    def after(self, state: State, unfinished: bytes, token_id: int) -> tuple[State, bytes] | None:
        """Return the state after a token, and the bytes of an unfinished character; None: it completes a word."""
        if unfinished:
            text, rest = read_bytes(unfinished + self._tokens.data[token_id])
        else:
            text, rest = self._tokens.texts[token_id], self._tokens.unfinished[token_id]
        read = self._automaton.read(state, text)
        return None if read is None else (read, rest)

    def token_ids(self, state: State, unfinished: bytes, *, is_last: bool) -> Tensor:
        """Return ids of the tokens that are refused, shape (R,); `is_last`: no token may follow them."""
        key = (state, unfinished, is_last)
        with self._lock:
            if key not in self._ids:
                self._ids[key] = torch.tensor(sorted(self._refused(*key)), dtype=torch.long)
            ids: Tensor = self._ids[key]
            return ids

    def _refused(self, state: State, unfinished: bytes, is_last: bool) -> set[int]:
        ends = self._eos_token_ids if state.ends_word else frozenset()
        if not unfinished:
            return self._refused_after_text(state, is_last) | ends
        tried = {*self._tokens.within, *(i for i, data in enumerate(self._tokens.data) if not data)}
        broken = self._automaton.read(state, _UNREADABLE)  # by any token that does not go on with the character
        if broken is None:
            refused = {*range(len(self._tokens.data))} - tried
        else:
            refused = self._refused_after_text(broken, is_last) - tried
        return refused | {i for i in tried if self.refuses(state, unfinished, i, is_last=is_last)} | ends

    def _refused_after_text(self, state: State, is_last: bool) -> set[int]:
        patterns, of_stops = self._automaton.may_complete(state, at_end=False)
        if is_last:
            patterns = [*patterns, *self._automaton.may_complete(state, at_end=True)[0]]
        plain = re.compile("|".join(of_stops)) if of_stops else None
        tried = self._tokens.matching(re.compile("|".join(patterns)), plain)
        tried |= set(self._tokens.open)
        refused = set(self._edge) if state.ends_word else set()
        return refused | {i for i in tried - refused if self.refuses(state, b"", i, is_last=is_last)}

    def refuses(self, state: State, unfinished: bytes, token_id: int, *, is_last: bool) -> bool:
        """Return whether a token is refused; see `token_ids`."""
        if token_id in self._eos_token_ids:
            return state.ends_word
        read = self.after(state, unfinished, token_id)
        if read is None:
            return True
        after, rest = read  # bytes that begin no letter end the word already: what follows them could not be refused
        return after.ends_word and (is_last or (bool(rest) and not may_become_letter(rest)))


class NeverConstraint(Constraint):
    """The state of one reply that must not contain some words, and may have to follow a grammar.

    Args:
        refusals: Which tokens complete the words, for the model's vocabulary.
        max_new_tokens: Most tokens of the reply: its last token does not leave a forbidden word as its end.
        grammar: Grammar that the reply must follow too. A token is also refused if it leaves a forbidden word where the
            grammar allows no letter next, as at the end of a string of bounded length.
    """

    def __init__(self, refusals: Refusals, max_new_tokens: int, grammar: Grammar | None = None) -> None:
        self._refusals, self._grammar = refusals, grammar
        self._num_left = max_new_tokens
        self._state, self._unfinished = START, b""
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
        if self._grammar is None or after is None or not after[0].ends_word:
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
        assert after is not None, "a token that completes a forbidden word is refused"
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
