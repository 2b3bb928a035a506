"""Compile grammars for the vocabulary of a model: each once, not in the decoder's thread, and under a deadline."""

from __future__ import annotations

import atexit
import json
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Collection, Mapping
from concurrent import futures
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from cachetools import LRUCache
from torch import Tensor

from mara_integrations.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    import xgrammar

# What xgrammar takes for a character of a string with a bound: it lets in control characters, which JSON forbids.
_BOUNDED_CHARACTER = ' ::= (([^\\"\\\\\\r\\n]))\n'
_JSON_CHARACTER = ' ::= (([^\\0-\\u001f\\"\\\\]))\n'

_Result = TypeVar("_Result")

# Some seconds are usual for a large schema on a slow machine. xgrammar can't be interrupted, but what `SchemaBounds`
# lets through ends by itself.
DEADLINE_S = 60.0
_CACHE_BYTES = 256 << 20  # compiled grammars of one vocabulary
_slots = threading.BoundedSemaphore(2)  # compilations at once: they take a core each, and the GIL between their parts
_running: set[threading.Thread] = set()
_EXIT_WAIT_S = 30.0

_compilers: weakref.WeakKeyDictionary[Any, dict[tuple[int, str], GrammarCompiler]] = weakref.WeakKeyDictionary()
_compilers_lock = threading.Lock()


class GrammarCompiler:
    """Compiles grammars for one vocabulary.

    Attributes:
        texts: The bytes of each token.
        sizes: Their number, (V,).
        longest: The most bytes that a token has.

    Args:
        tokenizer: The model's tokenizer.
        vocab_size: Width of the logits.
        eos_token_ids: Tokens that end a reply.

    Raises:
        MissingExtraError: If xgrammar is absent.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        try:
            import xgrammar
        except ImportError:
            raise MissingExtraError(
                "tools and JSON schemas need the package xgrammar", hint="pip install 'mara-integrations[tools]'"
            ) from None
        stops = sorted(eos_token_ids) or None
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size, stop_token_ids=stops)
        threads = max(1, (os.cpu_count() or 1) // 2)
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=threads, cache_limit_bytes=_CACHE_BYTES)
        self._compiled: LRUCache[str, xgrammar.CompiledGrammar] = LRUCache(
            _CACHE_BYTES, getsizeof=lambda compiled: compiled.memory_size_bytes
        )
        self._lock = threading.Lock()
        self.texts: list[bytes] = info.decoded_vocab
        self.sizes = torch.tensor([len(text) for text in self.texts])
        self.longest = int(self.sizes.max())

    @classmethod
    def of(cls, tokenizer: Any, vocab_size: int, eos_token_ids: Collection[int]) -> GrammarCompiler:
        """Return the one compiler of a tokenizer, for models of this width that end replies so."""
        with _compilers_lock:
            known, key = _compilers.setdefault(tokenizer, {}), (vocab_size, str(sorted(eos_token_ids)))
            if key not in known:
                known[key] = cls(tokenizer, vocab_size, eos_token_ids)
            return known[key]

    def compile(self, structural_tag: Mapping[str, Any]) -> xgrammar.CompiledGrammar:
        """Compile a structural tag of xgrammar, given as plain JSON.

        Raises:
            ConfigError: If it is malformed, or if compiling takes longer than the deadline.
        """
        key = json.dumps(structural_tag)
        with self._lock:
            if (compiled := self._compiled.get(key)) is not None:
                return compiled
        compiled = within(DEADLINE_S, lambda: self._compile(structural_tag))
        with self._lock:
            if compiled.memory_size_bytes <= _CACHE_BYTES:
                self._compiled[key] = compiled
        return compiled

    def allowed(self, matcher: xgrammar.GrammarMatcher) -> Tensor:
        """Return which tokens may come next, (V,), on the CPU."""
        import xgrammar

        bitmask = xgrammar.allocate_token_bitmask(1, len(self.texts))  # (1, V / 32), int32: all of them, to begin with
        matcher.fill_next_token_bitmask(bitmask)
        bits = bitmask[0][:, None] >> torch.arange(32, dtype=torch.int32)
        return (bits & 1).bool().flatten()[: len(self.texts)]

    def _compile(self, structural_tag: Mapping[str, Any]) -> xgrammar.CompiledGrammar:
        try:
            return self._compiler.compile_structural_tag(json.dumps(in_one_way(structural_tag)))
        except Exception as error:  # its C++ side raises RuntimeError and its own; all mean a schema it can't express
            reason = re.sub(r"^\[[\d:]+\] \S+: ", "", str(error).strip().splitlines()[-1])
            raise ConfigError(f"the schema can't be compiled to a grammar: {reason}") from error


def within(deadline_s: float, work: Callable[[], _Result]) -> _Result:
    """Run a function in a thread of its own, and return its result.

    Raises:
        ConfigError: If it takes longer than the deadline, waiting for other such work included. It then runs to
            its end, since nothing can stop it, and its result is dropped.
    """
    ends = time.monotonic() + deadline_s
    late = ConfigError(
        f"compiling a grammar took longer than {deadline_s:g} s", hint="give fewer tools, or simpler schemas"
    )
    if not _slots.acquire(timeout=deadline_s):
        raise late
    result: futures.Future[_Result] = futures.Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)
        finally:
            _running.discard(threading.current_thread())
            _slots.release()

    thread = threading.Thread(target=run, name="mara-grammar", daemon=True)
    _running.add(thread)
    thread.start()
    try:
        return result.result(timeout=max(0.0, ends - time.monotonic()))
    except futures.TimeoutError:  # before Python 3.11 not the built-in one
        if result.done():  # the work raised one itself
            raise
        raise late from None


@atexit.register
def _wait_for_running() -> None:
    """Let compilations end before Python does: xgrammar's C++ code aborts the process if it needs the GIL then."""
    ends = time.monotonic() + _EXIT_WAIT_S
    for thread in list(_running):
        thread.join(max(0.0, ends - time.monotonic()))


def in_one_way(form: Any) -> Any:
    """Return a structural tag whose JSON schemas are grammars without free white space; tagged arguments keep theirs.

    Args:
        form: A structural tag that `GrammarCompiler.compile` takes, or a part of one.
    """
    import xgrammar

    if isinstance(form, list):
        return [in_one_way(each) for each in form]
    if not isinstance(form, Mapping):
        return form
    if form.get("type") != "json_schema" or form.get("style", "json") != "json":
        return {key: in_one_way(value) for key, value in form.items()}
    schema = json.dumps(form["json_schema"])
    grammar = xgrammar.Grammar.from_json_schema(schema, any_whitespace=False, separators=(", ", ": "))
    # what it prints of a letter up to U+00FF would be read as a longer escape where a hexadecimal digit follows
    text = re.sub(r"(?<!\\)((?:\\\\)*)\\x([0-9a-f]{2})", r"\1\\u00\2", str(grammar))
    text = f"{text}\n".replace(_BOUNDED_CHARACTER, _JSON_CHARACTER)
    return {"type": "grammar", "grammar": text}
