"""`MARALLM`: one object that is a LlamaIndex LLM and a LangChain Runnable.

It does not inherit from LangChain's chat model: the two frameworks' `metadata` collide under pydantic, and LlamaIndex
wraps whatever is a LangChain model in an adapter. Its LangChain half is a `ChatMARA` that it holds.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from langchain_core.caches import BaseCache
from langchain_core.callbacks import Callbacks
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable, RunnableConfig
from llama_index.core.prompts import BasePromptTemplate
from pydantic import Field, PrivateAttr

from mara_integrations.frameworks.langchain import ChatMARA
from mara_integrations.frameworks.llama_index import GatedLLM
from mara_integrations.frameworks.settings import OF_SERVERS, EngineSettings

# Fields of the LangChain half beside those of `EngineSettings`.
_OF_LANGCHAIN = ("name", "cache", "callbacks", "streaming")

_Schema = TypeVar("_Schema")


def _of_langchain(name: str) -> Any:
    """Return a method of `ChatMARA` that is called on the chat model which a `MARALLM` holds."""

    @functools.wraps(getattr(ChatMARA, name))
    def call(self: MARALLM, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.as_langchain(), name)(*args, **kwargs)

    return call


class MARALLM(GatedLLM, Runnable[LanguageModelInput, AIMessage]):
    """A local model under a MARA head, for LlamaIndex and LangChain alike.

    ```python
    llm = MARALLM("smollm2", head="heads/brand-voice", max_tokens=100)

    llm.complete("Which plan has email support?")  # LlamaIndex; also chat, Settings.llm = llm, as_query_engine(llm=llm)
    (prompt | llm | StrOutputParser()).invoke({"question": "Which plan has email support?"})  # LangChain

    llm.invoke("Hi!", head=None, temperature=0.7)  # every call may say other settings
    llm.head = "heads/brief"  # as may the object, at any time
    llm.engine.verify("Hi!")  # the engine below, with the same settings
    llm.close()  # gives the memory back
    ```

    `stream` and `astream` serve both frameworks: given a LlamaIndex prompt template they stream its text, given
    anything else LangChain's messages. Code that checks for LangChain's `BaseChatModel` takes `as_langchain()`.

    Keyword arguments: those of `EngineSettings`, and those below.
    """

    name: str | None = None
    """Name of the runnable in LangChain's traces."""
    cache: BaseCache | bool | None = None
    """LangChain's cache of answers; see `BaseChatModel.cache`."""
    callbacks: Callbacks = Field(default=None, exclude=True)
    """LangChain's callbacks of every call; see `BaseChatModel.callbacks`."""
    streaming: bool = False
    """Whether LangChain's `invoke` streams where a callback asks for tokens."""

    _chat: ChatMARA | None = PrivateAttr(default=None)

    def as_langchain(self) -> ChatMARA:
        """Return the LangChain chat model with these settings; both run the same loaded model."""
        given = [name for name in _OF_LANGCHAIN if name in self.model_fields_set]  # LangChain looks at what was set
        values = {name: getattr(self, name) for name in (*EngineSettings.model_fields, *given)}
        if self._chat is None or any(getattr(self._chat, name) is not value for name, value in values.items()):
            chat = ChatMARA(**{name: value for name, value in values.items() if name not in OF_SERVERS})
            for name, value in values.items():  # the objects themselves, and what warns where there is no server
                chat.__dict__[name] = value
            self._chat = chat
        if self._chat._engine is not self.engine:
            self._chat._engine = self.engine
        self._chat.profile = self._chat._resolve_model_profile()
        return self._chat

    def invoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> AIMessage:
        """Answer one input; see `ChatMARA`."""
        return self.as_langchain().invoke(input, config, **kwargs)

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        """Let the model call tools; see `ChatMARA.bind_tools`."""
        return self.as_langchain().bind_tools(tools, **kwargs)

    @overload
    def with_structured_output(
        self, schema: type[_Schema], *, include_raw: Literal[False] = False, **kwargs: Any
    ) -> Runnable[LanguageModelInput, _Schema]: ...
    @overload
    def with_structured_output(
        self, schema: dict[str, Any] | None = None, *, include_raw: Literal[False] = False, **kwargs: Any
    ) -> Runnable[LanguageModelInput, dict[str, Any]]: ...
    @overload
    def with_structured_output(
        self, schema: dict[str, Any] | type | None = None, *, include_raw: bool, **kwargs: Any
    ) -> Runnable[LanguageModelInput, dict[str, Any]]: ...
    def with_structured_output(self, schema: Any = None, **kwargs: Any) -> Runnable[LanguageModelInput, Any]:
        """Make every answer an object of a schema; see `ChatMARA.with_structured_output`."""
        return self.as_langchain().with_structured_output(schema, **kwargs)

    # Type checkers know these from `Runnable`; what only chat models have comes by `__getattr__`.
    if not TYPE_CHECKING:
        ainvoke = _of_langchain("ainvoke")
        batch = _of_langchain("batch")
        abatch = _of_langchain("abatch")
        batch_as_completed = _of_langchain("batch_as_completed")
        abatch_as_completed = _of_langchain("abatch_as_completed")
        stream_events = _of_langchain("stream_events")
        astream_events = _of_langchain("astream_events")

    # A variable of a LlamaIndex template may be called `input` or `config`, so no argument of these has a name.

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

    @property
    def InputType(self) -> Any:
        """See `Runnable.InputType`."""
        return self.as_langchain().InputType

    @property
    def OutputType(self) -> Any:
        """See `Runnable.OutputType`."""
        return self.as_langchain().OutputType

    def __getattr__(self, name: str) -> Any:
        """Find what only LangChain's chat models have: `profile`, `configurable_fields`, `get_num_tokens` and so on."""
        if (name.startswith("_") and name not in _PRIVATE) or not hasattr(ChatMARA, name):
            return super().__getattr__(name)  # type: ignore[misc]  # pydantic's
        return getattr(self.as_langchain(), name)


# What LangChain itself asks of a chat model.
_PRIVATE = ("_llm_type", "_get_ls_params", "_identifying_params")


def _is_template(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether these are the arguments of LlamaIndex' `stream(prompt, **variables)`."""
    return isinstance(args[0] if args else kwargs.get("prompt"), BasePromptTemplate)
