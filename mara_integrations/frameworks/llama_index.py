"""The LlamaIndex half of `MARALLM`: an LLM over the gated engine, and LlamaIndex' messages as ours."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import Any, TypeVar

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection, default_completion_to_prompt
from llama_index.core.program.utils import create_flexible_model
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools.types import BaseTool
from pydantic import BaseModel

from mara_integrations.engine.generation import Generation
from mara_integrations.engine.streams import AsyncStream
from mara_integrations.engine.tickets import Update
from mara_integrations.errors import CutReplyError
from mara_integrations.frameworks.llama_index_messages import as_conversation, count_with, read_arguments
from mara_integrations.frameworks.settings import EngineSettings
from mara_integrations.messages import Message, Prompt
from mara_integrations.sampling import SamplingParams

Answer = TypeVar("Answer", ChatResponse, CompletionResponse)
Model = TypeVar("Model", bound=BaseModel)
# Makes the responses of one request, one of each update
Answers = Callable[[], Callable[..., Answer]]


class GatedLLM(EngineSettings, FunctionCallingLLM):
    """LlamaIndex' LLM; what `MARALLM` is without its LangChain half.

    `raw` of a response is a plain dict: `model_name`, `finish_reason`, `token_ids`, `gate` counts, `usage`, and with
    `trace=True` the trace. In a stream it comes once, with the last response.
    """

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised settings."""
        return "MARALLM"

    @property
    def metadata(self) -> LLMMetadata:
        """Return what LlamaIndex packs prompts by; weights are not loaded for it.

        It counts prompts with one tokenizer a process, `Settings.tokenizer`: GPT-3.5's, unless somebody chose another.
        Reading this puts the model's own in place of that default, so that packed prompts fit; a choice is left alone.
        """
        outline = self.engine.outline
        count_with(outline.tokenizer)
        return LLMMetadata(
            context_window=outline.context_window,
            num_output=self.max_tokens or SamplingParams.model_fields["max_new_tokens"].default,
            is_chat_model=True,
            is_function_calling_model=True,
            model_name=self.model_name,
        )

    def to_payload(self) -> dict[str, Any]:
        """Return what events tell of this LLM: its settings, without `metadata`, which may load files."""
        return {"class_name": self.class_name(), "model_name": self.model_name, **self._described()}

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation; keyword arguments are request settings, as `temperature`, `head` or `trace`."""
        return self._generate(self._of_chat(messages), kwargs, self._chat_answers)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat` without blocking the event loop; cancelling the task stops the generation."""
        return await self._agenerate(self._of_chat(messages), kwargs, self._chat_answers)

    # The framework's events are told around the answers of a stream, and ours is the outermost generator again: its
    # handlers may keep the exception that a generator is closed with, and by it all generators inside (`AsyncStream`).

    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """`chat`, as it is written; closing the generator stops the generation."""
        answers = self._stream(self._of_chat(messages), kwargs, self._chat_answers)

        @llm_chat_callback()
        def told(_: GatedLLM, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
            return answers

        return _closing(told(self, messages, **kwargs), answers)

    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> AsyncStream[ChatResponse]:
        """`stream_chat` without blocking the event loop."""
        answers = self._astream(self._of_chat(messages), kwargs, self._chat_answers)

        @llm_chat_callback()
        async def told(_: GatedLLM, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
            return answers

        return AsyncStream(await told(self, messages, **kwargs), answers.cancel)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a user's message, or with `formatted=True` (or `raw=True`) continue a text."""
        return self._generate(self._of_completion(prompt, formatted, kwargs), kwargs, self._completions)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """`complete` without blocking the event loop; cancelling the task stops the generation."""
        return await self._agenerate(self._of_completion(prompt, formatted, kwargs), kwargs, self._completions)

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """`complete`, as it is written; closing the generator stops the generation."""
        answers = self._stream(self._of_completion(prompt, formatted, kwargs), kwargs, self._completions)

        @llm_completion_callback()
        def told(_: GatedLLM, prompt: str, **kwargs: Any) -> CompletionResponseGen:
            return answers

        return _closing(told(self, prompt, **kwargs), answers)

    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> AsyncStream[CompletionResponse]:
        """`stream_complete` without blocking the event loop."""
        answers = self._astream(self._of_completion(prompt, formatted, kwargs), kwargs, self._completions)

        @llm_completion_callback()
        async def told(_: GatedLLM, prompt: str, **kwargs: Any) -> CompletionResponseAsyncGen:
            return answers

        return AsyncStream(await told(self, prompt, **kwargs), answers.cancel)

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        messages = list(chat_history or [])
        if user_msg is not None:
            messages.append(ChatMessage(user_msg) if isinstance(user_msg, str) else user_msg)
        called = {"tools": [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools]} if tools else {}
        choice = tool_choice or ("any" if tool_required and tools else None)
        return {
            "messages": messages,
            **called,
            "tool_choice": choice,
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """Return the calls of a response. While it is being written, their arguments are what is there so far.

        Raises:
            CutReplyError: If `max_tokens` cut the response before its call was whole.
            ValueError: If there is none, and `error_on_no_tool_call`.
        """
        blocks = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        is_last = response.raw is not None  # a stream brings it once, at its end
        if is_last and any(isinstance(block.tool_kwargs, str) for block in blocks):
            _check_whole(response, "its call")
        if not blocks and error_on_no_tool_call:
            _check_whole(response, "a call")
            raise ValueError(f"the answer calls no tool: {response.message.content!r}")
        return [
            ToolSelection(
                tool_id=block.tool_call_id or "",
                tool_name=block.tool_name,
                tool_kwargs={} if is_last and isinstance(block.tool_kwargs, str) else read_arguments(block.tool_kwargs),
            )
            for block in blocks
        ]

    def _structured_stream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **variables: Any,
    ) -> Generator[Any, None, None]:
        # The frameworks' own program looks for calls where only OpenAI's classes put them; JSON is streamed as it is.
        as_object = _objects_of(output_cls)
        responses = self.stream_chat(self._get_messages(prompt, **variables), **_answering(output_cls, llm_kwargs))
        return (found for response in responses if (found := as_object(response)) is not None)

    async def _structured_astream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **variables: Any,
    ) -> AsyncStream[Any]:
        as_object = _objects_of(output_cls)
        messages = self._get_messages(prompt, **variables)
        responses = await self.astream_chat(messages, **_answering(output_cls, llm_kwargs))
        objects = (found async for response in responses if (found := as_object(response)) is not None)
        return AsyncStream(objects, responses.cancel)

    def _of_chat(self, messages: Sequence[ChatMessage]) -> Prompt:
        render = self.messages_to_prompt
        if render is not None and render is not generic_messages_to_prompt:  # the user's own template
            return render(messages)
        return as_conversation(messages)

    def _of_completion(self, prompt: str, formatted: bool, call: Mapping[str, Any]) -> Prompt:
        if formatted or call.get("raw"):
            return prompt
        render = self.completion_to_prompt
        if render is not None and render is not default_completion_to_prompt:
            return render(prompt)
        return [Message("user", prompt)]

    def _settings_for(self, prompt: Prompt, call: dict[str, Any]) -> dict[str, Any]:
        settings = self._call_settings(call)
        return {**settings, "raw": True} if isinstance(prompt, str) else settings

    # Everything below is undecorated, so that each call is one event and one turn of the rate limiter.

    def _generate(self, prompt: Prompt, call: dict[str, Any], answers: Answers[Answer]) -> Answer:
        settings = self._settings_for(prompt, call)
        generation = self.engine.generate(prompt, **settings)
        return answers()(Update.whole(generation), is_stream=False)

    async def _agenerate(self, prompt: Prompt, call: dict[str, Any], answers: Answers[Answer]) -> Answer:
        settings = self._settings_for(prompt, call)
        generation = await self.engine.agenerate(prompt, **settings)
        return answers()(Update.whole(generation), is_stream=False)

    def _stream(self, prompt: Prompt, call: dict[str, Any], answers: Answers[Answer]) -> Generator[Answer, None, None]:
        settings = self._settings_for(prompt, call)
        answer = answers()
        with closing(self.engine.stream(prompt, **settings)) as updates:
            for update in updates:
                if update.has_news:
                    yield answer(update)

    def _astream(self, prompt: Prompt, call: dict[str, Any], answers: Answers[Answer]) -> AsyncStream[Answer]:
        settings = self._settings_for(prompt, call)
        updates = self.engine.astream(prompt, **settings)

        async def written() -> AsyncGenerator[Answer, None]:
            answer = answers()
            async with aclosing(updates):
                async for update in updates:
                    if update.has_news:
                        yield answer(update)

        return AsyncStream(written(), updates.cancel)

    def _chat_answers(self) -> Callable[..., ChatResponse]:
        """Return what makes the responses of one request, each with all that was written so far."""
        thoughts = text = ""

        def answer(update: Update, is_stream: bool = True) -> ChatResponse:
            nonlocal thoughts, text
            thought, delta = update.thoughts, update.text
            thoughts, text = thoughts + thought, text + delta
            blocks: list[Any] = [ThinkingBlock(content=thoughts)] if thoughts else []
            blocks += [TextBlock(text=text)] if text or not update.calls else []
            for call in update.calls:
                arguments = call.arguments if call.parsed is None else call.parsed
                blocks.append(ToolCallBlock(tool_call_id=call.id, tool_name=call.name, tool_kwargs=arguments))
            message = ChatMessage(blocks, role=MessageRole.ASSISTANT)
            if not is_stream:
                return ChatResponse(message=message, **self._about(update.generation))
            news = {"thinking_delta": thought} if thought else {}
            about = self._about(update.generation)
            return ChatResponse(message=message, delta=delta, additional_kwargs=news, **about)

        return answer

    def _completions(self) -> Callable[..., CompletionResponse]:
        """Return what makes the responses of one completion: as `_chat_answers`, with the text alone.

        Thoughts are no part of the text; they are `additional_kwargs["thinking"]`.
        """
        as_chat = self._chat_answers()

        def answer(update: Update, is_stream: bool = True) -> CompletionResponse:
            chat = as_chat(update)
            thoughts = [block.content or "" for block in chat.message.blocks if isinstance(block, ThinkingBlock)]
            return CompletionResponse(
                text=chat.message.content or "",
                delta=chat.delta if is_stream else None,
                additional_kwargs={"thinking": "".join(thoughts)} if thoughts else {},
                raw=chat.raw,
            )

        return answer

    def _about(self, generation: Generation | None) -> dict[str, Any]:
        if generation is None:
            return {}
        usage = {
            "prompt_tokens": generation.prompt_tokens,
            "completion_tokens": generation.completion_tokens,
            "total_tokens": generation.prompt_tokens + generation.completion_tokens,
        }
        return {"raw": {**self.engine.report(generation), "usage": usage}}


def _closing(
    outer: Generator[Answer, None, None], inner: Generator[Answer, None, None]
) -> Generator[Answer, None, None]:
    """Yield what `outer` yields; left early, close `inner` too."""
    try:
        yield from outer
    finally:
        inner.close()


def _check_whole(response: ChatResponse, what: str) -> None:
    """Refuse a response that was cut.

    Raises:
        CutReplyError: If it ended at `max_tokens`.
    """
    about = response.raw if isinstance(response.raw, dict) else {}
    if about.get("finish_reason") == "length":
        num_tokens = about["usage"]["completion_tokens"]
        message = f"the reply was cut after {num_tokens} tokens, before {what} was whole"
        raise CutReplyError(message, hint="raise max_tokens, or bound its strings with maxLength")


def _answering(output_cls: type[Model], llm_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    schema = {"name": output_cls.__name__, "schema": output_cls.model_json_schema()}
    return {**(llm_kwargs or {}), "response_format": {"type": "json_schema", "json_schema": schema}}


def _objects_of(output_cls: type[Model]) -> Callable[[ChatResponse], BaseModel | None]:
    """Return what reads responses as objects: loose ones while JSON is being written, the last as the class itself."""
    loose = create_flexible_model(output_cls)

    def as_object(response: ChatResponse) -> BaseModel | None:
        text = response.message.content or ""
        if response.raw is not None:
            _check_whole(response, f"its {output_cls.__name__}")
            return output_cls.model_validate_json(text)
        fields = read_arguments(text)
        return loose(**fields) if fields else None

    return as_object
