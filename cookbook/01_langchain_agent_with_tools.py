"""An agent of LangChain that looks up a price, converts it, and answers; on a model of 135M parameters, on a CPU.

A model this small does not call tools unasked, and when it does it invents arguments. Here it need not: a middleware
says which tool is next (`tool_choice`), and the grammar lets the model write nothing but a call which that tool takes.
What is left to the model is what it can do: copy a name or a number from the conversation, and phrase the answer.
A larger model runs the same agent without the middleware.

    python cookbook/01_langchain_agent_with_tools.py [head]
"""

from __future__ import annotations

import sys
from typing import Any, Literal

from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, ModelResponse, wrap_model_call
from langchain_core.messages import AIMessageChunk, SystemMessage, ToolMessage
from langchain_core.tools import tool

from mara_integrations import ChatMARA

QUESTION = "What does the lamp cost in dollars?"
PLAN = ("find_price", "euros_to_dollars")


@tool
def find_price(article: Literal["lamp", "chair", "table"]) -> str:
    """Price of an article in euros."""
    return f"{ {'chair': 40, 'lamp': 25, 'table': 90}[article] } euros"


@tool
def euros_to_dollars(euros: Literal[25, 40, 90]) -> str:
    """The same amount in dollars."""
    return f"{euros * 1.1:.2f} dollars"


@wrap_model_call
def follow_the_plan(request: ModelRequest, handler: Any) -> ModelResponse:
    """Force the next tool of the plan; after the last one, ask for text."""
    found = [message.text for message in request.messages if isinstance(message, ToolMessage)]
    if len(found) < len(PLAN):
        return handler(request.override(tool_choice=PLAN[len(found)]))
    # a small model answers better from facts than from a record of calls
    facts = SystemMessage(f"The article costs {', which is '.join(found)}.")
    asked = request.messages[:1]
    return handler(request.override(system_message=facts, messages=asked, tools=[], model_settings={"max_tokens": 24}))


def main(head: str | None = None) -> dict[str, Any]:
    """Run the agent, and show what it writes while it writes it.

    Args:
        head: A trained head; it judges the calls' free tokens and the answer.
    """
    model = ChatMARA("smollm2", head=head, max_tokens=80)
    agent = create_agent(
        model,
        [find_price, euros_to_dollars],
        system_prompt="You are a shop assistant. Answer in one short sentence.",
        middleware=[follow_the_plan],
    )

    messages: list[Any] = []
    print(f"> {QUESTION}\n")
    # "messages" streams tokens and parts of calls as they are written, "values" the conversation after each step
    inputs = {"messages": [("human", QUESTION)]}
    num_chunks = 0
    for mode, news in agent.stream(inputs, stream_mode=["messages", "values"]):
        if mode == "values":
            messages = news["messages"]
        elif isinstance(news[0], AIMessageChunk):
            num_chunks += 1
            for call in news[0].tool_call_chunks:
                print(f"\n[{call['name']}] " if call["name"] else call["args"], end="", flush=True)
            print(news[0].text, end="", flush=True)
    print("\n")
    for message in messages:
        print(f"{message.type:>6}: {message.text or [(call['name'], call['args']) for call in message.tool_calls]}")
    return {"messages": messages, "answer": messages[-1].text, "num_chunks": num_chunks}


if __name__ == "__main__":
    main(*sys.argv[1:])
