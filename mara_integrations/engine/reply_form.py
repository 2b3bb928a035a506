"""Apply a form of reply to one loaded model: its syntax of calls, its thoughts, and the grammar of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mara_integrations.engine.grammar import Grammar
from mara_integrations.engine.grammar_compiler import GrammarCompiler, in_one_way
from mara_integrations.engine.never import NeverConstraint
from mara_integrations.engine.patterns.automaton import PatternAutomaton
from mara_integrations.engine.refusals import refusals_of
from mara_integrations.engine.request import Constraint
from mara_integrations.engine.token_texts import TokenTexts
from mara_integrations.engine.vllm_requests import EngineGrammar
from mara_integrations.errors import ConfigError
from mara_integrations.messages import Message, Tool
from mara_integrations.models.load import LoadedModel
from mara_integrations.replies.families import FAMILIES, CallFamily
from mara_integrations.replies.forms import ReplyForm
from mara_integrations.replies.harmony import HarmonyReader
from mara_integrations.replies.reader import ReplyReader, TagReader
from mara_integrations.replies.reasoning import CLOSE, OPEN, Thoughts, ThoughtSplitter
from mara_integrations.rewards.rules import split_notations
from mara_integrations.rewards.words import ForbiddenWords
from mara_integrations.sampling import SamplingParams

_MAX_OPEN_TOKENS = 16  # room for `<think>` and the white space after it, in the smallest tokens


def family_for(model: LoadedModel) -> CallFamily:
    """Return how a model writes calls, by its chat template."""
    return FAMILIES[model.encoder.family]


def shown_tokens(model: LoadedModel, tools: Sequence[Tool]) -> tuple[str, ...]:
    """Return the special tokens that are part of a reply's text, because its thoughts and calls are read by them."""
    family = family_for(model)
    return (OPEN, CLOSE, *(family.tags if tools or family.name == "harmony" else ()))


def end_tokens(model: LoadedModel) -> frozenset[int]:
    """Return the tokens that end a reply: those of the model, and what its family writes after a call."""
    end = family_for(model).end
    token_id = None if end is None else model.tokenizer.get_vocab().get(end)
    return model.eos_token_ids if token_id is None else model.eos_token_ids | {token_id}


def reader_for(model: LoadedModel, form: ReplyForm, prompt_ids: Sequence[int]) -> ReplyReader:
    """Return what reads a reply of this form.

    The reply begins with thoughts if its prompt ends inside of them, whether a template or the user wrote that prompt.
    """
    family, must_call = family_for(model), bool(form.tools) and not form.is_free
    if family.name == "harmony":
        return HarmonyReader(must_call)
    prompt_end: str = model.tokenizer.decode(list(prompt_ids[-_MAX_OPEN_TOKENS:]), skip_special_tokens=False)
    is_open = prompt_end.rstrip().endswith(OPEN)
    return TagReader(ThoughtSplitter(is_open), family.reader(form.tools) if form.tools else None, must_call)


def thoughts_of(model: LoadedModel) -> Thoughts:
    """Return where the model's chat template leaves a reply when it begins."""
    if OPEN not in str(getattr(model.tokenizer, "chat_template", None)):
        return "none"
    prompt = model.encoder.render([Message("user", "?")]).rstrip()
    if prompt.endswith(CLOSE):  # it was told not to think
        return "none"
    return "begun" if prompt.endswith(OPEN) else "possible"


def grammar_for(model: LoadedModel, form: ReplyForm) -> Grammar | EngineGrammar | None:
    """Return the constraint of replies in a form; None where any text is allowed. vLLM applies its own.

    Raises:
        ConfigError: If a schema can't be compiled to a grammar.
        MissingExtraError: If xgrammar is not installed.
    """
    grammar = form.grammar(family_for(model), thoughts_of(model))
    if grammar is None:
        return None
    vocabulary = model.tokenizer, model.vocab_size, end_tokens(model)
    if model.engine == "vllm":
        GrammarCompiler.of(*vocabulary).compile(grammar)  # what can't be compiled is said here, in our words
        return EngineGrammar(in_one_way(grammar))
    return Grammar(grammar, tokenizer=vocabulary[0], vocab_size=vocabulary[1], eos_token_ids=vocabulary[2])


def constraint_for(
    model: LoadedModel, form: ReplyForm, sampling: SamplingParams, stop: Sequence[str]
) -> Constraint | None:
    """Return what constrains a reply: the grammar of its form, and words and patterns that must never appear.

    Args:
        model: The model.
        form: Form of the reply.
        sampling: Names the words and patterns, and bounds the length of the reply.
        stop: All strings that end the reply.

    Raises:
        ConfigError: See `grammar_for` and `refusals_of`; or if the form itself has a forbidden word, or the tokenizer
            is of no kind whose tokens can be read as text.
        MissingExtraError: See `grammar_for`.
    """
    grammar = grammar_for(model, form)
    if not sampling.never or isinstance(grammar, EngineGrammar):
        return grammar
    _check_agreement(form.grammar(family_for(model)), sampling.never)
    tokens = TokenTexts.of(model.tokenizer, model.vocab_size, shown_tokens(model, form.tools), end_tokens(model))
    refusals = refusals_of(tokens, sampling.never, stop, end_tokens(model))
    return NeverConstraint(refusals, sampling.max_new_tokens, grammar)


def _check_agreement(grammar: Mapping[str, Any] | None, never: Sequence[str]) -> None:
    """Refuse a form whose own text has a forbidden word or pattern: the reply could not be written.

    Raises:
        ConfigError: Names the text, and the word or pattern.
    """
    texts = list(_fixed_texts(grammar or {}))
    words, notations = split_notations(never) if texts else ([], [])
    rule = ForbiddenWords(words) if words else None
    automata = [(notation, PatternAutomaton(notation)) for notation in notations]
    for text in texts:
        found = [repr(text[start:end]) for start, end in (rule.violations(text) if rule is not None else ())]
        found += [notation for notation, automaton in automata if automaton.is_found(text)]
        if found:
            raise ConfigError(
                f"never has {found[0]}, which the form of the reply itself writes in {text!r:.80}",
                hint="rename the tool, key or value, or leave it out of never",
            )


def _fixed_texts(grammar: Any, name: str = "") -> Iterator[str]:
    """Texts that a structural tag writes itself: names of tools and keys, and values that it lists."""
    if isinstance(grammar, str):
        if name in ("begin", "end", "const", "enum"):
            yield grammar
    elif isinstance(grammar, Mapping):
        if name == "properties":
            yield from grammar
        for key, value in grammar.items():
            yield from _fixed_texts(value, "" if name == "properties" else key)
    elif isinstance(grammar, list | tuple):
        for value in grammar:
            yield from _fixed_texts(value, name)
