"""What a form of reply means for one loaded model: its syntax of calls, its thoughts, and the grammar of both."""

from __future__ import annotations

from mara_integrations.engine.grammar import Grammar
from mara_integrations.messages import Message
from mara_integrations.models.load import LoadedModel
from mara_integrations.replies.forms import CallSyntax, ReplyForm, syntax_of
from mara_integrations.replies.reasoning import CLOSE, OPEN, Thoughts


def syntax_for(model: LoadedModel) -> CallSyntax:
    """Return the syntax in which a model writes calls, by its chat template."""
    return syntax_of(getattr(model.tokenizer, "chat_template", None))


def thoughts_of(model: LoadedModel) -> Thoughts:
    """Return where the model's chat template leaves a reply when it begins."""
    if OPEN not in str(getattr(model.tokenizer, "chat_template", None)):
        return "none"
    prompt = model.encoder.render([Message("user", "?")]).rstrip()
    if prompt.endswith(CLOSE):  # it was told not to think
        return "none"
    return "begun" if prompt.endswith(OPEN) else "possible"


def grammar_for(model: LoadedModel, form: ReplyForm) -> Grammar | None:
    """Return the constraint of replies in a form; None where any text is allowed.

    Raises:
        ConfigError: If a schema can't be made a grammar.
        MissingExtraError: If xgrammar is not installed.
    """
    grammar = form.grammar(syntax_for(model), thoughts_of(model))
    if grammar is None:
        return None
    vocab_size = model.model.get_output_embeddings().out_features
    return Grammar(grammar, tokenizer=model.tokenizer, vocab_size=vocab_size, eos_token_ids=model.eos_token_ids)
