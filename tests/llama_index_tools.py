"""A tool and a schema for LlamaIndex on a tiny random model: it writes nonsense, and the grammar makes it legal."""

from __future__ import annotations

from llama_index.core.tools import FunctionTool
from pydantic import BaseModel, Field

from mara_integrations.frameworks.llama_index import GatedLLM


def add(a: bool, b: bool) -> int:  # a random model writes integers without end
    """Add two numbers."""
    return a + b


TOOL = FunctionTool.from_defaults(add)


class Person(BaseModel):
    name: str = Field(max_length=10)
    age: int = Field(ge=0, le=150)


def check_a_required_call(caller: GatedLLM) -> None:
    """Ask for a call of the tool, and check that it is made and run."""
    response = caller.chat_with_tools([TOOL], "hi", tool_required=True)

    (call,) = caller.get_tool_calls_from_response(response)
    assert call.tool_name == "add" and set(call.tool_kwargs) == {"a", "b"} and call.tool_id
    result = caller.predict_and_call([TOOL], "hi", tool_required=True)
    assert result.response == str(sum(call.tool_kwargs.values()))
