"""Make a request for the decoder from a prompt, the settings that hold for it, and the model that replies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

from mara_integrations.engine.reply_form import constraint_for, end_tokens, reader_for, shown_tokens
from mara_integrations.engine.request import Request
from mara_integrations.engine.settings import ResolvedSettings
from mara_integrations.errors import ConfigError, ContextLengthError
from mara_integrations.messages import Conversation, Message, Prompt
from mara_integrations.models.load import LoadedModel
from mara_integrations.replies.text import TextStream

# What widens the context window, where an engine was told how wide it is.
_RAISE = {"llama.cpp": ", or raise n_ctx", "vllm": ", or raise max_model_len"}


def build_request(
    model: LoadedModel, prompt: Prompt, settings: ResolvedSettings, top_logprobs: int | None = None
) -> Request:
    """Return the request that asks a model to reply to a prompt.

    Args:
        model: The model.
        prompt: As `MARAEngine.generate` takes it.
        settings: The settings that hold.
        top_logprobs: See `Request`.

    Raises:
        ConfigError: If the prompt has no tokens, or is a list of messages under `raw`; or see `constraint_for`.
        ContextLengthError: If the prompt leaves no room for a reply.
        MissingExtraError: See `constraint_for`.
    """
    prompt, form = prepared(prompt, settings), settings.form
    prompt_ids = model.encoder.encode(prompt, form.tools)
    if not prompt_ids:
        raise ConfigError("the prompt has no tokens", hint="give it some text")
    room = model.context_window - len(prompt_ids)
    if room < 1:
        raise ContextLengthError(
            f"the prompt has {len(prompt_ids)} tokens; this model's maximum context length is "
            f"{model.context_window} tokens, the reply included",
            hint="shorten the prompt" + _RAISE.get(model.engine, ""),
        )
    stop = (*settings.sampling.stop, *model.encoder.stop_for(prompt))
    sampling = settings.sampling.updated(max_new_tokens=min(settings.sampling.max_new_tokens, room))
    return Request(
        prompt_ids=prompt_ids,
        sampling=sampling,
        gate=settings.gate,
        head=settings.head,
        eos_token_ids=end_tokens(model),
        text=TextStream(model.tokenizer, stop, shown_tokens(model, form.tools)),
        reader=reader_for(model, form, prompt_ids),
        constraint=constraint_for(model, form, sampling, stop),
        top_logprobs=top_logprobs,
    )


def prepared(prompt: Prompt, settings: ResolvedSettings) -> Prompt:
    """Return a prompt as the encoder takes it: a conversation with its system message, raw text, or token ids.

    Raises:
        ConfigError: If the prompt is a list of messages under `raw`.
    """
    if isinstance(prompt, str):
        if settings.raw:
            return prompt
        prompt = [Message("user", prompt)]
    if not isinstance(prompt, Conversation) and len(prompt) > 0 and isinstance(prompt[0], Message):
        prompt = Conversation(tuple(cast(Sequence[Message], prompt)))
    if not isinstance(prompt, Conversation):
        return prompt
    if settings.raw:
        raise ConfigError("raw=True takes a string or token ids, and the prompt is a list of messages")
    return prompt.with_system(settings.system_prompt)


def check_prompt(prompt: Prompt) -> None:
    """Refuse a prompt with nothing to reply to, and text that no tokenizer can read.

    Raises:
        ConfigError: If there is no text and no call beside the system message, or a text has half of a surrogate pair.
    """
    for text in [prompt] if isinstance(prompt, str) else _contents(prompt):
        if (half := re.search(r"[\ud800-\udfff]", text)) is not None:
            raise ConfigError(
                f"the prompt has {half[0]!r} at character {half.start()}, which is half of a surrogate pair",
                hint="its bytes were not UTF-8: decode them with errors='replace'",
            )
    if isinstance(prompt, Conversation):
        prompt = prompt.messages
    others = [part for part in prompt if not isinstance(part, Message) or part.role != "system"]
    if prompt and not others:
        raise ConfigError("the prompt has no message but the system's", hint="add one of the user")
    if not any(part.content or part.tool_calls if isinstance(part, Message) else True for part in others):
        raise ConfigError("the prompt is empty", hint="give it some text")


def _contents(prompt: Prompt) -> list[str]:
    messages = prompt.messages if isinstance(prompt, Conversation) else prompt
    return [message.content for message in messages if isinstance(message, Message)]
