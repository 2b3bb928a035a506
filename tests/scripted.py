"""A model that writes a given reply, as far as the grammar lets it, through tokenizer, decoder and parser."""

from __future__ import annotations

from typing import Any

from mara_integrations import MARALLM
from mara_integrations.engine.decoder import Decoder
from mara_integrations.messages import Message
from mara_integrations.runtime import worker_for
from mara_integrations.testing import ScriptedBackend, tiny_model, tiny_tokenizer

TURN = "[assistant] "
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}" + TURN


def writes(
    reply: str,
    template: str = TEMPLATE,
    special: list[str] | None = None,
    added: list[str] | None = None,
    **kwargs: Any,
) -> MARALLM:
    """An LLM that writes `reply` and ends; where it may not go on with it, an 8, or what is first.

    Args:
        reply: The text, special tokens included.
        template: The chat template; it has to hold `TURN`, after which a reply begins.
        special: Special tokens that the tokenizer has.
        added: Tokens of their own that are not special.
        **kwargs: Settings of the LLM.
    """
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": special or []})
    tokenizer.add_tokens(added or [])
    size = len(tokenizer)
    loaded = tiny_model(vocab_size=size, max_position_embeddings=4096), tokenizer
    llm = MARALLM(loaded, **{"max_tokens": 200, **kwargs})
    turn = TURN + llm.engine.model.encoder.render([Message("user", "?")]).rpartition(TURN)[2]
    begin, wanted = (list(tokenizer(text)["input_ids"]) for text in (turn, reply))

    def script(token_ids: Any) -> list[float]:
        tokens = list(token_ids)
        begins = (i for i in range(len(tokens), -1, -1) if tokens[i : i + len(begin)] == begin)
        done = tokens[next(begins, len(tokens)) + len(begin) :]
        following = [*wanted, 0][len(done)] if done == wanted[: len(done)] else 0
        return [20.0 if token_id == following else float(token_id == 24) for token_id in range(size)]

    worker_for(llm.engine.model).decoder = Decoder(ScriptedBackend(script, size))
    return llm
