"""`ChatMARA`: a LangChain chat model over the gated engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, closing
from contextvars import ContextVar
from operator import itemgetter
from typing import Any, Literal, TypeAlias, TypeVar, overload

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
)
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema
from typing_extensions import Self

from mara_integrations.engine.streams import AsyncStream
from mara_integrations.engine.tickets import Update
from mara_integrations.errors import ConfigError
from mara_integrations.frameworks.langchain_messages import as_conversation
from mara_integrations.frameworks.langchain_replies import LangChainReply, take_top_logprobs
from mara_integrations.frameworks.schemas import check_schema, json_schema, named, openai_tool
from mara_integrations.frameworks.settings import EngineSettings
from mara_integrations.frameworks.structured_output import arguments_parser, object_parser
from mara_integrations.replies.forms import ReplyForm

StructuredOutputMethod: TypeAlias = Literal["json_schema", "function_calling", "json_mode"]
_Schema = TypeVar("_Schema")

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

    Serialisation: the object pickles where its model is named. LangChain's `dumpd` writes down its settings, but `load`
    refuses to build it, and `init_chat_model` knows hosted providers only: pass the object itself.
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
        """Return the key of a cached answer. It names the head by its weights, so that two heads share no answers."""
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
        """Return the token ids of a text in the model's own tokenizer."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return list(self.engine.model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def get_num_tokens_from_messages(self, messages: Sequence[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Return the number of tokens of the prompt that messages become, those of the chat template included."""
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
            ConfigError: If `tool_choice` is not a tool's name.
        """
        bound = {"tools": [openai_tool(tool) for tool in tools], "tool_choice": tool_choice}
        bound["parallel_tool_calls"] = parallel_tool_calls
        ReplyForm.of_call(dict(bound))  # refuses a wrong choice now
        return self.bind(**{name: value for name, value in bound.items() if value is not None}, **kwargs)

    @overload  # type: ignore[override]  # the base class allows dictionaries and pydantic's classes alone
    def with_structured_output(
        self,
        schema: type[_Schema],
        *,
        method: StructuredOutputMethod = "json_schema",
        include_raw: Literal[False] = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, _Schema]: ...
    @overload
    def with_structured_output(
        self,
        schema: dict[str, Any] | None = None,
        *,
        method: StructuredOutputMethod = "json_schema",
        include_raw: Literal[False] = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any]]: ...
    @overload
    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: StructuredOutputMethod = "json_schema",
        include_raw: bool,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any]]: ...
    def with_structured_output(
        self,
        schema: Any = None,
        *,
        method: StructuredOutputMethod = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
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
            profile["max_input_tokens"] = self._engine.outline.context_window
        return profile

    def load(self) -> Self:
        """Load model and head now instead of on first use; `profile` knows the context window from then on."""
        super().load()
        self.profile = self._resolve_model_profile()
        return self

    def _reply(self, stop: list[str] | None, call: dict[str, Any]) -> LangChainReply:
        call = {name: value for name, value in call.items() if name not in _LANGCHAINS_OWN}
        top_logprobs = take_top_logprobs(call)
        settings = self._call_settings({**call, "stop": stop})
        return LangChainReply(self.engine, settings, top_logprobs)


def _response_format(schema: Any) -> dict[str, Any]:
    """Return the `response_format` of OpenAI's API for a schema; None allows any object."""
    if schema is None:
        return {"type": "json_object"}
    whole = json_schema(schema) or convert_to_json_schema(schema)
    return {"type": "json_schema", "json_schema": {"name": whole.get("title", "answer"), "schema": whole}}


def _all_at_once(config: Any, count: int) -> list[RunnableConfig]:
    """Return configs with as many threads as inputs, unless they say otherwise: all that waits is decoded together."""
    from langchain_core.runnables.config import get_config_list

    threads = min(max(count, 1), _BATCH_THREADS)
    return [{"max_concurrency": threads, **_given(one)} for one in get_config_list(config, count)]


def _given(config: RunnableConfig) -> RunnableConfig:
    if config.get("max_concurrency") is None:
        config.pop("max_concurrency", None)
    return config
