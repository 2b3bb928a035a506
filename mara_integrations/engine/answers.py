"""Report a finished reply in the terms that both frameworks and the server use: usage, trace, log-probabilities."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from mara_integrations.engine.generation import Generation, TracePosition
from mara_integrations.models.load import LoadedModel


def answer_report(generation: Generation, model: LoadedModel) -> dict[str, Any]:
    """Return what an answer says about itself, as plain JSON.

    Returns:
        `model_name`, `finish_reason`, `token_ids`, the counts of `GateStats` as `gate`, which vLLM has not, and with
        `trace=True` a `trace`: for each position its candidates (`token_id`, `token`, `log_prob`, `accept_logit` where
        the gate was asked), which was `taken`, and the `outcome`.
    """
    report = {
        "model_name": model.name,
        "finish_reason": generation.finish_reason,
        **({} if model.engine == "vllm" else {"gate": asdict(generation.stats)}),
        "token_ids": list(generation.token_ids),
    }
    if generation.trace is not None:
        report["trace"] = [_plain(position, model.tokenizer) for position in generation.trace]
    return report


def log_prob_report(generation: Generation, model: LoadedModel, top_logprobs: int = 0) -> dict[str, Any]:
    """Return the log-probabilities of a reply with a trace or alternatives in OpenAI's form, as plain JSON.

    Each of `content` is a token of `token_ids`: `token`, `bytes`, `logprob` and `top_logprobs`, the most probable of
    the candidates that were left for the gate. Beyond that form: `accept_logit` of the token taken (None where the
    gate was not asked) and the `outcome`; see `TracePosition`. Without a trace, `top_logprobs` are the most probable of
    all tokens, and nothing is told of the gate.
    """
    content: list[dict[str, Any]] = []
    if generation.alternatives is not None:
        taken = zip(generation.token_ids, generation.log_probs, generation.alternatives, strict=True)
        for token_id, log_prob, alternatives in taken:
            told = [{**_token(other, model.tokenizer), "logprob": value} for other, value in alternatives]
            own = {**_token(token_id, model.tokenizer), "logprob": log_prob}
            content.append({**own, "top_logprobs": told[:top_logprobs]})
        return {"content": content}
    assert generation.trace is not None
    for position in generation.trace:
        tokens = [
            {**_token(token_id, model.tokenizer), "logprob": log_prob}
            for token_id, log_prob in zip(position.token_ids, position.log_probs, strict=True)
        ]
        logits = dict(enumerate(position.accept_logits))
        gate = {"accept_logit": logits.get(position.taken), "outcome": position.outcome}
        content.append({**tokens[position.taken], "top_logprobs": tokens[:top_logprobs], **gate})
    return {"content": content}


def _token(token_id: int, tokenizer: Any) -> dict[str, Any]:
    """Return a token's text and bytes; the bytes are None where they can't be told, for a part of a character."""
    text = tokenizer.decode([token_id])
    if "\ufffd" not in text:
        return {"token": text, "bytes": list(text.encode())}
    written = str(tokenizer.convert_ids_to_tokens(token_id))
    if re.fullmatch("<0x[0-9A-F]{2}>", written):  # sentencepiece
        return {"token": text, "bytes": [int(written[3:5], 16)]}
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    table = {character: byte for byte, character in bytes_to_unicode().items()}
    is_byte_level = all(character in table for character in written)
    return {"token": text, "bytes": [table[character] for character in written] if is_byte_level else None}


def _plain(position: TracePosition, tokenizer: Any) -> dict[str, Any]:
    unasked = [None] * (len(position.token_ids) - len(position.accept_logits))
    columns = zip(position.token_ids, position.log_probs, [*position.accept_logits, *unasked], strict=True)
    candidates = [
        {"token_id": token_id, "token": tokenizer.decode([token_id]), "log_prob": log_prob, "accept_logit": logit}
        for token_id, log_prob, logit in columns
    ]
    return {"candidates": candidates, "taken": position.taken, "outcome": position.outcome}
