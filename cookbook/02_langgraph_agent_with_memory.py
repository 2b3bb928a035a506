"""A LangGraph agent with memory: a checkpointer carries what it is told in one turn over to the next.

The graph is written out, so that you see what the model is asked at each step. The node `note` may only call the tool
(`tool_choice` is its name), the node `answer` may only write text. Each `thread_id` is a conversation of its own;
with a checkpointer that writes to disk (`langgraph-checkpoint-sqlite`) it outlives the process.

    python cookbook/02_langgraph_agent_with_memory.py [head]
"""

from __future__ import annotations

import sys
from typing import Any, Literal

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode

from mara_integrations import ChatMARA


@tool
def write_down(colour: Literal["blue", "green", "red", "yellow"]) -> str:
    """Write down the colour that the customer wants."""
    return f"The customer wants {colour} curtains."


def build(model: ChatMARA) -> Any:
    """The graph: note, run the tool, answer; a turn without a colour goes to the answer at once."""
    noting = model.bind_tools([write_down], tool_choice="write_down")

    def route(state: MessagesState) -> str:
        words = state["messages"][-1].text.lower()
        return "note" if any(colour in words for colour in ("blue", "green", "red", "yellow")) else "answer"

    def note(state: MessagesState) -> dict[str, list[AIMessage]]:
        return {"messages": [noting.invoke(state["messages"][-1:])]}

    def answer(state: MessagesState) -> dict[str, list[AIMessage]]:
        # a small model answers better from its notes than from a record of calls
        notes = [message.text for message in state["messages"] if isinstance(message, ToolMessage)]
        question = [message for message in state["messages"] if isinstance(message, HumanMessage)][-1]
        about = SystemMessage(notes[-1] if notes else "You sell curtains. You do not know the customer.")
        return {"messages": [model.invoke([about, question], max_tokens=24)]}

    graph = StateGraph(MessagesState)
    graph.add_node("note", note)
    graph.add_node("tools", ToolNode([write_down]))
    graph.add_node("answer", answer)
    graph.add_conditional_edges(START, route, ["note", "answer"])
    graph.add_edge("note", "tools")
    graph.add_edge("tools", "answer")
    graph.add_edge("answer", END)
    return graph.compile(checkpointer=InMemorySaver())


def main(head: str | None = None) -> dict[str, Any]:
    """Two turns of one conversation, and one of another that knows nothing of it.

    Args:
        head: A trained head; it judges the calls' free tokens and the answers.
    """
    model = ChatMARA("smollm2", head=head, max_tokens=80)
    graph = build(model)

    def turn(thread: str, text: str) -> list[Any]:
        print(f"\n[{thread}] > {text}")
        state = graph.invoke({"messages": [("human", text)]}, {"configurable": {"thread_id": thread}})
        print(f"[{thread}] {state['messages'][-1].text}")
        return list(state["messages"])

    turn("ann", "I would like green curtains.")
    ann = turn("ann", "Which colour do I want?")
    bob = turn("bob", "Which colour do I want?")
    notes = [message.text for message in ann if message.type == "tool"]
    print(f"\nAnn's conversation has {len(ann)} messages, noted: {notes}; Bob's has {len(bob)}")
    return {"notes": notes, "ann": ann, "bob": bob}


if __name__ == "__main__":
    main(*sys.argv[1:])
