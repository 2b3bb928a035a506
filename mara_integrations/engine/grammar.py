"""A grammar as a mask on the logits (xgrammar): what it forbids is no candidate, so the head judges legal ones alone.

Where it leaves one token, that is taken unasked; it moves on only with tokens that the gate took. JSON is written in
one way, `{"a": 1, "b": [2, 3]}`, so that all of it but the values is certain: such text costs no forward a token.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import Self

from mara_integrations.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    import xgrammar

# by tokenizer, and by width and end of the models that use it
_vocabularies: weakref.WeakKeyDictionary[Any, dict[tuple[int, str], _Vocabulary]] = weakref.WeakKeyDictionary()


class Grammar:
    """The state of one reply in a grammar.

    It says what may come next, and nothing about how long a reply may be: one that `max_tokens` cuts stays cut.

    Args:
        structural_tag: Of xgrammar, as plain JSON.
        tokenizer: Of the model.
        vocab_size: Width of the logits.
        eos_token_ids: Allowed where the grammar may end.

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
        try:
            import xgrammar
        except ImportError:
            raise MissingExtraError(
                "tools and JSON schemas need the package xgrammar", hint="pip install 'mara-integrations[tools]'"
            ) from None
        stops = sorted(eos_token_ids) or None
        known, key = _vocabularies.setdefault(tokenizer, {}), (vocab_size, str(stops))
        if key not in known:
            info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size, stop_token_ids=stops)
            known[key] = _Vocabulary.of(xgrammar.GrammarCompiler(info), info.decoded_vocab)
        self._vocabulary = known[key]
        try:
            compiled = self._vocabulary.compiler.compile_structural_tag(json.dumps(_in_one_way(structural_tag)))
        except Exception as error:  # its C++ side raises RuntimeError and its own; all mean a schema it can't express
            reason = str(error).strip().splitlines()[-1]
            raise ConfigError(f"the schema can't be made a grammar: {reason}") from error
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)  # (1, V / 32), int32, on the CPU
        is_free_text = structural_tag["format"]["type"] == "triggered_tags"
        has_control = self._vocabulary.has_control
        self._forbidden = torch.zeros_like(has_control) if is_free_text else has_control  # (V,)
        self._tokenizer = tokenizer

    def mask(self, logits: Tensor) -> None:
        """Set the logits of tokens that may not come next to -inf, in place, shape (V,)."""
        if self._matcher.is_terminated():
            return
        allowed = self._allowed(self._matcher)
        certain = self.certain()
        if certain:
            allowed = torch.arange(len(allowed)) == certain[0]
        logits.masked_fill_(~allowed.to(logits.device), -torch.inf)

    def accept(self, token_id: int) -> None:
        """The gate took this token."""
        self._matcher.accept_token(token_id)

    def certain(self) -> list[int]:
        """Tokens of the text that must come next, as the tokenizer writes it; up to where one may go beyond it."""
        text = _certain_text(self._matcher)
        left, certain, matcher = len(text.encode()), list[int](), self._matcher.fork()
        for token_id in self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else ():
            is_longest = int(self._vocabulary.sizes[self._allowed(matcher)].max()) <= left
            if not is_longest or not matcher.accept_token(token_id):  # some tokenizers put a space before every text
                break
            certain.append(token_id)
            left -= len(self._vocabulary.texts[token_id])
        return certain

    def _allowed(self, matcher: xgrammar.GrammarMatcher) -> Tensor:
        """Which tokens may come next, (V,), on the CPU."""
        self._bitmask.fill_(-1)  # all of them, which it need not say
        matcher.fill_next_token_bitmask(self._bitmask)
        bits = self._bitmask[0][:, None] >> torch.arange(32, dtype=torch.int32)
        return (bits & 1).bool().flatten()[: len(self._forbidden)] & ~self._forbidden


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """What all grammars for one vocabulary share: `sizes` are bytes, (V,).

    `has_control`, (V,), is true of tokens that hold a control character other than a newline: bounded strings let them
    in, JSON does not.
    """

    compiler: xgrammar.GrammarCompiler
    texts: list[bytes]
    sizes: Tensor
    has_control: Tensor

    @classmethod
    def of(cls, compiler: xgrammar.GrammarCompiler, texts: list[bytes]) -> Self:
        has_control = [any(byte < 32 and byte != 10 for byte in text) for text in texts]
        return cls(compiler, texts, torch.tensor([len(text) for text in texts]), torch.tensor(has_control))


def _certain_text(matcher: xgrammar.GrammarMatcher) -> str:
    try:
        return matcher.find_jump_forward_string()
    except UnicodeDecodeError:  # the rest of a character
        return ""


def _in_one_way(form: Any) -> Any:
    """A structural tag whose JSON schemas are grammars without free white space."""
    import xgrammar

    if isinstance(form, list):
        return [_in_one_way(each) for each in form]
    if not isinstance(form, Mapping):
        return form
    if form.get("type") != "json_schema":
        return {key: _in_one_way(value) for key, value in form.items()}
    schema = json.dumps(form["json_schema"])
    grammar = xgrammar.Grammar.from_json_schema(schema, any_whitespace=False, separators=(", ", ": "))
    # what it prints of a letter up to U+00FF would be read as a longer escape where a hexadecimal digit follows
    text = re.sub(r"(?<!\\)((?:\\\\)*)\\x([0-9a-f]{2})", r"\1\\u00\2", str(grammar))
    return {"type": "grammar", "grammar": text}
