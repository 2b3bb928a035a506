"""`ChatMARA`: a LangChain chat model over the gated engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, closing
from contextvars import ContextVar
from dataclasses import replace
from functools import cached_property
from operator import itemgetter
from typing import Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.json import parse_partial_json
from pydantic import BaseModel
from typing_extensions import Self

from mara_integrations.engine.generation import Generation
from mara_integrations.engine.worker import AsyncStream, Update
from mara_integrations.errors import ConfigError
from mara_integrations.frameworks.answers import answer_report, log_prob_report, reply_reader
from mara_integrations.frameworks.schemas import check_schema, json_schema, named, openai_tool
from mara_integrations.frameworks.settings import EngineSettings
from mara_integrations.frameworks.structured_output import arguments_parser, object_parser
from mara_integrations.messages import Message, ToolCall
from mara_integrations.replies.forms import ReplyForm
from mara_integrations.replies.reader import ReplyReader
from mara_integrations.replies.tool_calls import Call, Piece
from mara_integrations.runtime import MARAEngine

# Arguments of a call that LangChain gives to itself.
_LANGCHAINS_OWN = ("stream", "ls_structured_output_format", "structured_output_format")
# Where `_astream` notes what `astream` has to stop.
_opened: ContextVar[list[AsyncStream[Update]] | None] = ContextVar("_opened", default=None)
# What one batch decodes at once; more wait, as they would inside the engine.
_BATCH_THREADS = 64


class ChatMARA(EngineSettings, BaseChatModel):
    """Chat model that runs a local model under a MARA head.

    Key init args: see `EngineSettings`; all of its request settings can be given per call too, as
    `llm.invoke(prompt, temperature=0.7, head="heads/brief")`, or be bound with `llm.bind(...)`.

    Instantiate, invoke, stream:

    ```python
    llm = ChatMARA("smollm2", head="heads/brand-voice", max_tokens=100)
    llm.invoke("Which plan has email support?").content
    for chunk in llm.stream("Which plan has email support?"):
        print(chunk.text, end="")
    ```

    Response metadata: `model_name`, `finish_reason`, `token_ids`, and under `gate` how many candidates were accepted
    and rejected; with `trace=True` also what the gate saw at each position. With `logprobs=True` or `top_logprobs=n`,
    per call or bound, `logprobs` in the form of OpenAI's API, with each token's `accept_logit` and `outcome` beside it;
    a stream brings them with its last chunk. Usage metadata counts tokens.

    Reasoning: thoughts that a reply begins with, between `<think>` and `</think>`, are no part of its text; they are
    the `reasoning` block of its `content_blocks`, and `additional_kwargs["reasoning_content"]`.
    """

    streaming: bool = False

    @property
    def _llm_type(self) -> str:
        return "mara"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return self._described()

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params.setdefault("ls_model_name", self.model_name)
        if stop := stop or self.stop:
            params["ls_stop"] = stop
        return params

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """The key of a cached answer: it names the head by its weights, so that two heads share no answers."""
        return f"{type(self).__name__}{self._fingerprint({'stop': stop, **kwargs})}"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        reply = self._reply(stop, kwargs)
        return reply.result(self.engine.generate(as_conversation(messages), **reply.settings))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        reply = self._reply(stop, kwargs)
        return reply.result(await self.engine.agenerate(as_conversation(messages), **reply.settings))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        reply = self._reply(stop, kwargs)
        with closing(self.engine.stream(as_conversation(messages), **reply.settings)) as updates:
            for update in updates:
                for chunk in reply.chunks(update):
                    if run_manager:
                        run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        reply = self._reply(stop, kwargs)
        stream = self.engine.astream(as_conversation(messages), **reply.settings)
        if (opened := _opened.get()) is not None:
            opened.append(stream)
        async with aclosing(stream) as updates:
            async for update in updates:
                for chunk in reply.chunks(update):
                    if run_manager:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncStream[AIMessageChunk]:
        """Answer one input, as it is written; left early, it stops at its next token. See `Runnable.astream`."""
        opened: list[AsyncStream[Update]] = []
        chunks = super().astream(input, config, **kwargs)

        async def noted() -> AsyncGenerator[AIMessageChunk, None]:
            token = _opened.set(opened)  # LangChain's generators stand between this stream and the engine's
            try:
                first = await anext(chunks, None)
            finally:
                _opened.reset(token)
            if first is not None:
                yield first
                async for chunk in chunks:
                    yield chunk

        def cancel() -> None:
            for stream in opened:
                stream.cancel()

        return AsyncStream(noted(), cancel)

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Answer all inputs, decoded together, each with its own callbacks and cache; see `Runnable.batch`."""
        config = _all_at_once(config, len(inputs))
        return super().batch(inputs, config, return_exceptions=return_exceptions, **kwargs)

    def batch_as_completed(
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        **kwargs: Any,
    ) -> Iterator[tuple[int, Any]]:
        """`batch`, each answer as soon as it is there; see `Runnable.batch_as_completed`."""
        return super().batch_as_completed(inputs, _all_at_once(config, len(inputs)), **kwargs)

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of a text in the model's own tokenizer."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return list(self.engine.model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def get_num_tokens_from_messages(self, messages: Sequence[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Length of the prompt that these messages become, the chat template's own tokens included."""
        form = ReplyForm.of_call({"tools": [openai_tool(tool) for tool in tools or ()]})
        return len(self.engine.encode(as_conversation(messages), form=form))

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Let the model call tools; a grammar makes every call one that the tool takes.

        Args:
            tools: Tool objects, functions, pydantic classes, or JSON schemas.
            tool_choice: `auto` (the default): text or calls. `any`: a call. A tool's name: a call of that tool. `none`.
            parallel_tool_calls: Several calls in one answer; by default in `auto` alone.
            **kwargs: Settings to bind beside them.

        Raises:
            ConfigError: If `tool_choice` is no tool's name.
        """
        bound = {"tools": [openai_tool(tool) for tool in tools], "tool_choice": tool_choice}
        bound["parallel_tool_calls"] = parallel_tool_calls
        ReplyForm.of_call(dict(bound))  # refuses a wrong choice now
        return self.bind(**{name: value for name, value in bound.items() if value is not None}, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """Make every answer an object of a schema; a grammar holds the model to it.

        Args:
            schema: A pydantic class, a TypedDict, or a JSON schema; None in `json_mode` allows any object.
            method: `json_schema`, `json_mode`: the answer is the object. `function_calling`: the arguments of a call.
            include_raw: Return `{"raw": message, "parsed": object, "parsing_error": None or the error}`.
            strict: Always so.
            **kwargs: Settings to bind beside it.

        Raises:
            ConfigError: If `schema` is none of these. The runnable that is returned raises LangChain's
                `OutputParserException` where a reply was cut by `max_tokens`, so that there is no whole object.
        """
        schema = named(schema) if isinstance(schema, dict) else schema
        if schema is not None:
            check_schema(schema)
            told = {"kwargs": {"method": method, "strict": strict}, "schema": schema}
            kwargs["ls_structured_output_format"] = told
        model: Runnable[LanguageModelInput, AIMessage]
        if method != "function_calling":
            model = self.bind(response_format=_response_format(schema), **kwargs)
            parser = object_parser(schema)
        elif schema is not None:
            model = self.bind_tools([schema], tool_choice="any", **kwargs)
            parser = arguments_parser(schema)
        else:
            raise ConfigError("with_structured_output needs a schema", hint="or method='json_mode'")
        if not include_raw:
            return model | parser
        parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=model) | parsed.with_fallbacks([failed], exception_key="parsing_error")

    def _resolve_model_profile(self) -> ModelProfile:
        profile = ModelProfile(
            tool_calling=True,
            tool_choice=True,
            structured_output=True,
            text_inputs=True,
            text_outputs=True,
            image_inputs=False,
            audio_inputs=False,
            video_inputs=False,
        )
        if self._engine is not None and self._engine.is_loaded:
            profile["max_input_tokens"] = self._engine.model.context_window
        return profile

    def load(self) -> Self:
        """Load model and head now instead of on first use; `profile` knows the context window from then on."""
        super().load()
        self.profile = self._resolve_model_profile()
        return self

    def _reply(self, stop: list[str] | None, call: dict[str, Any]) -> _Reply:
        call = {name: value for name, value in call.items() if name not in _LANGCHAINS_OWN}
        top_logprobs = _top_logprobs(call)
        settings = self._call_settings({**call, "stop": stop})
        return _Reply(self.engine, settings, top_logprobs)


class _Reply:
    """Makes LangChain's messages of what the engine writes to one request; all of it after the model was loaded."""

    def __init__(self, engine: MARAEngine, settings: dict[str, Any], top_logprobs: int | None) -> None:
        self.settings = settings
        self._engine = engine
        self._top_logprobs = top_logprobs
        self._has_trace = engine.given(**settings).get("trace", False)
        if top_logprobs is not None:
            settings["trace"] = True  # the log-probabilities are read from it

    @cached_property
    def _reader(self) -> ReplyReader:
        return reply_reader(self.settings, self._engine.model)

    def result(self, generation: Generation) -> ChatResult:
        """The whole reply."""
        pieces = self._reader.push(generation.text, generation.finish_reason)
        thoughts = "".join(piece.thoughts for piece in pieces)
        message = AIMessage(
            content="".join(piece.text for piece in pieces),
            additional_kwargs={"reasoning_content": thoughts} if thoughts else {},
            response_metadata=self._report(generation),
            usage_metadata=_usage(generation),
        )
        for call in self._reader.calls:
            arguments = call.parsed
            if arguments is not None:
                message.tool_calls.append(tool_call(name=call.name, args=arguments, id=call.id))
            else:
                error = f"{call.error} (finish_reason {generation.finish_reason!r})"
                invalid = invalid_tool_call(name=call.name, args=call.arguments, id=call.id, error=error)
                message.invalid_tool_calls.append(invalid)
        generation_info = {"finish_reason": generation.finish_reason}
        return ChatResult(
            generations=[ChatGeneration(message=message, generation_info=generation_info)],
            llm_output={"model_name": message.response_metadata["model_name"]},
        )

    def chunks(self, update: Update) -> Iterator[ChatGenerationChunk]:
        """Chunks of one update; usage and report come once, with the last."""
        for piece in self._reader.push(update.text, update.finish_reason):
            if piece.call is None or piece.call.name:
                yield ChatGenerationChunk(message=_chunk(piece))
        if update.generation is None:
            return
        for call in self._reader.calls:
            if call.error is not None:
                yield ChatGenerationChunk(message=_invalid(call))
        message = AIMessageChunk(
            content="",
            response_metadata=self._report(update.generation),
            usage_metadata=_usage(update.generation),
            chunk_position="last",
        )
        yield ChatGenerationChunk(message=message, generation_info={"finish_reason": update.generation.finish_reason})

    def _report(self, generation: Generation) -> dict[str, Any]:
        shown = generation if self._has_trace else replace(generation, trace=None)
        report = answer_report(shown, self._engine.model)
        if self._top_logprobs is not None:
            report["logprobs"] = log_prob_report(generation, self._engine.model, self._top_logprobs)
        return report


def _chunk(piece: Piece) -> AIMessageChunk:
    """LangChain's form of a piece; the id and name of a call come with the first of its chunks."""
    if piece.thoughts:
        return AIMessageChunk(content="", additional_kwargs={"reasoning_content": piece.thoughts})
    if piece.call is None:
        return AIMessageChunk(content=piece.text)
    call, is_first = piece.call, not piece.call.arguments
    chunk = tool_call_chunk(
        name=call.name if is_first else None,
        args=call.arguments,
        id=call.id if is_first else None,
        index=call.index,
    )
    return AIMessageChunk(content="", tool_call_chunks=[chunk])


def _invalid(call: Call) -> AIMessageChunk:
    """What makes the chunks of a call add up to an invalid one; all of a call without a name."""
    spoiled = _spoiled(call.arguments)
    if call.name:
        chunk = tool_call_chunk(name=None, args=spoiled, id=None, index=call.index)
    else:
        chunk = tool_call_chunk(name="", args=call.arguments + spoiled, id=call.id, index=call.index)
    return AIMessageChunk(content="", tool_call_chunks=[chunk])


def _response_format(schema: Any) -> dict[str, Any]:
    """The `response_format` of OpenAI's API for a schema; None allows any object."""
    if schema is None:
        return {"type": "json_object"}
    whole = json_schema(schema) or convert_to_json_schema(schema)
    return {"type": "json_schema", "json_schema": {"name": whole.get("title", "answer"), "schema": whole}}


def _top_logprobs(call: dict[str, Any]) -> int | None:
    """Take the wish for log-probabilities out of a call's arguments; None: there is none."""
    is_wanted, count = call.pop("logprobs", None), call.pop("top_logprobs", None)
    if is_wanted not in (None, True, False):
        raise ConfigError(f"logprobs={is_wanted!r} is not allowed", hint="it is True or False; see top_logprobs")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
        raise ConfigError(f"top_logprobs={count!r} is not allowed", hint="it is a number of tokens, 0 or more")
    if is_wanted is False or (is_wanted is None and count is None):
        return None
    return count or 0


def _spoiled(arguments: str) -> str:
    """What to add to the arguments of a call that can't be read, for chunks that add up to an invalid call.

    LangChain completes JSON that is cut short when it adds chunks; half a call would be made. A bracket that does not
    match is what it does not complete.
    """
    for end in ("", "]", "}", '"]', '"}', '""]', '""}'):  # in an object, in a list, in a string, after a backslash
        try:
            read = parse_partial_json(arguments + end) if arguments + end else {}
        except ValueError:
            return end
        if not isinstance(read, dict):
            return end
    return ""


def as_conversation(messages: Sequence[BaseMessage]) -> list[Message]:
    """LangChain's messages as ours.

    Raises:
        ConfigError: If a message holds something else than text, or is of an unknown type.
    """
    return [_as_message(message) for message in messages]


def _as_message(message: BaseMessage) -> Message:
    text = _text(message.content)
    match message:
        case SystemMessage():
            return Message("system", text)
        case HumanMessage():
            return Message("user", text)
        case AIMessage():
            calls = (ToolCall(call["id"] or "", call["name"], call["args"]) for call in message.tool_calls)
            return Message("assistant", text, tool_calls=tuple(calls))
        case ToolMessage():
            return Message("tool", text, tool_call_id=message.tool_call_id, name=message.name)
        case FunctionMessage():
            return Message("tool", text, name=message.name)
        case ChatMessage(role="system" | "user" | "assistant" | "tool" as role):
            return Message(role, text)
    raise ConfigError(f"a message of type {message.type!r} has no place in a chat template", hint="give it a role")


# Parts of a message that are not for the model to read: calls are in `tool_calls`, thoughts are not shown again.
_UNREAD = ("tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "function_call", "reasoning", "thinking")


def _text(content: str | list[str | dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    parts = []
    for block in content:
        if isinstance(block, str):
            parts.append(block)
        elif isinstance(block.get("text"), str):
            parts.append(block["text"])
        elif block.get("type") not in _UNREAD:
            raise ConfigError(f"content of type {block.get('type')!r} is not text", hint="the model reads text only")
    return "".join(parts)


def _usage(generation: Generation) -> UsageMetadata:
    sizes = generation.prompt_tokens, len(generation.token_ids)
    return UsageMetadata(input_tokens=sizes[0], output_tokens=sizes[1], total_tokens=sum(sizes))


def _all_at_once(config: Any, count: int) -> list[RunnableConfig]:
    """As many threads as inputs, unless the config says otherwise: all that waits is decoded together."""
    from langchain_core.runnables.config import get_config_list

    threads = min(max(count, 1), _BATCH_THREADS)
    return [{"max_concurrency": threads, **_given(one)} for one in get_config_list(config, count)]


def _given(config: RunnableConfig) -> RunnableConfig:
    if config.get("max_concurrency") is None:
        config.pop("max_concurrency", None)
    return config
