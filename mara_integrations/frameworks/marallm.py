"""`MARALLM`: one object that is a LlamaIndex LLM and a LangChain Runnable.

Why it does not inherit from LangChain's chat model too: the two frameworks' `metadata` collide under pydantic, and
LlamaIndex wraps whatever is a LangChain model in an adapter. So its LangChain half is a `ChatMARA`, made when asked.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import Runnable, RunnableConfig
from llama_index.core.prompts import BasePromptTemplate

from mara_integrations.frameworks.langchain import ChatMARA
from mara_integrations.frameworks.llama_index import GatedLLM
from mara_integrations.frameworks.settings import EngineSettings


class MARALLM(GatedLLM, Runnable[LanguageModelInput, AIMessage]):
    """A local model under a MARA head, for LlamaIndex and LangChain alike.

    ```python
    llm = MARALLM("smollm2", head="heads/brand-voice")
    llm.complete("Which plan has email support?")  # LlamaIndex; also chat, Settings.llm = llm, as_query_engine(llm=llm)
    (prompt | llm | StrOutputParser()).invoke({"question": "Which plan has email support?"})  # LangChain
    ```

    `stream` and `astream` serve both frameworks: given a LlamaIndex prompt template they stream its text, given
    anything else LangChain's messages. Code that checks for LangChain's `BaseChatModel` takes `as_langchain()`.

    Keyword arguments: see `EngineSettings`.
    """

    # Runnable's: there it is an annotation alone, which pydantic would take for a required field
    name: str | None = None

    def as_langchain(self) -> ChatMARA:
        """The LangChain chat model with these settings; both run the same loaded model."""
        chat = ChatMARA(**{name: getattr(self, name) for name in EngineSettings.model_fields}, name=self.name)
        chat._engine = self.engine
        chat.profile = chat._resolve_model_profile()
        return chat

    def invoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> AIMessage:
        """Answer one input; see `ChatMARA`."""
        return self.as_langchain().invoke(input, config, **kwargs)

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        """`invoke` without blocking the event loop; cancelling the task stops the generation."""
        return await self.as_langchain().ainvoke(input, config, **kwargs)

    def batch(self, inputs: list[LanguageModelInput], config: Any = None, **kwargs: Any) -> list[AIMessage]:
        """Answer all inputs, decoded together; see `ChatMARA.batch`."""
        return self.as_langchain().batch(inputs, config, **kwargs)

    async def abatch(self, inputs: list[LanguageModelInput], config: Any = None, **kwargs: Any) -> list[AIMessage]:
        """`batch` without blocking the event loop."""
        return await self.as_langchain().abatch(inputs, config, **kwargs)

    def batch_as_completed(
        self, inputs: Sequence[LanguageModelInput], config: Any = None, **kwargs: Any
    ) -> Iterator[tuple[int, Any]]:
        """`batch`, each answer as soon as it is there."""
        return self.as_langchain().batch_as_completed(inputs, config, **kwargs)

    def abatch_as_completed(
        self, inputs: Sequence[LanguageModelInput], config: Any = None, **kwargs: Any
    ) -> AsyncIterator[tuple[int, Any]]:
        """`batch_as_completed` without blocking the event loop."""
        return self.as_langchain().abatch_as_completed(inputs, config, **kwargs)

    # The arguments of the next two are those of two frameworks: a variable of a LlamaIndex template may be called
    # `input` or `config`, so nothing is named here.

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        """LlamaIndex: text pieces of `stream(template, **variables)`. LangChain: chunks of `stream(input, config)`."""
        if _is_template(args, kwargs):
            return super().stream(*args, **kwargs)
        return self.as_langchain().stream(*args, **kwargs)

    def astream(self, *args: Any, **kwargs: Any) -> Any:
        """`stream` without blocking the event loop; LlamaIndex awaits it, LangChain iterates over it at once."""
        if _is_template(args, kwargs):
            return super().astream(*args, **kwargs)
        return self.as_langchain().astream(*args, **kwargs)

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        """Let the model call tools; see `ChatMARA.bind_tools`."""
        return self.as_langchain().bind_tools(tools, **kwargs)

    def with_structured_output(self, schema: Any = None, **kwargs: Any) -> Runnable[LanguageModelInput, Any]:
        """Make every answer an object of a schema; see `ChatMARA.with_structured_output`."""
        return self.as_langchain().with_structured_output(schema, **kwargs)

    def stream_events(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """See `BaseChatModel.stream_events`."""
        return self.as_langchain().stream_events(input, config, **kwargs)

    def astream_events(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """See `BaseChatModel.astream_events`."""
        return self.as_langchain().astream_events(input, config, **kwargs)

    def configurable_fields(self, **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        """See `RunnableSerializable.configurable_fields`; the result is a LangChain model."""
        return self.as_langchain().configurable_fields(**kwargs)

    def configurable_alternatives(self, *args: Any, **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        """See `RunnableSerializable.configurable_alternatives`; the result is a LangChain model."""
        return self.as_langchain().configurable_alternatives(*args, **kwargs)

    def get_num_tokens_from_messages(self, messages: Sequence[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Length of the prompt that these LangChain messages become."""
        return self.as_langchain().get_num_tokens_from_messages(messages, tools)

    @property
    def InputType(self) -> Any:
        """See `Runnable.InputType`."""
        return self.as_langchain().InputType

    @property
    def OutputType(self) -> Any:
        """See `Runnable.OutputType`."""
        return self.as_langchain().OutputType

    @property
    def profile(self) -> Any:
        """See `BaseChatModel.profile`."""
        return self.as_langchain().profile

    @property
    def _llm_type(self) -> str:
        return self.as_langchain()._llm_type

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self.as_langchain()._get_ls_params(stop, **kwargs)


def _is_template(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether these are the arguments of LlamaIndex' `stream(prompt, **variables)`."""
    return isinstance(args[0] if args else kwargs.get("prompt"), BasePromptTemplate)
