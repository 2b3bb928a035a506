"""Guardrails around a gated model: what comes in is cleaned, what goes out is checked, each token is judged between.

A head and a guardrail answer different questions. The head chooses among the model's own words, at every token, and has
learned what is preferred. A guardrail is a rule on whole messages: `PIIMiddleware` of LangChain replaces personal data
before the model reads it, and in its answers. They do not know of each other and add up.

NVIDIA's NeMo Guardrails takes the same object, where it is installed (`pip install nemoguardrails`): see `with_nemo`.

    python cookbook/04_guardrails.py [head]
"""

from __future__ import annotations

import sys
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import PIIMiddleware

from mara_integrations import ChatMARA

QUESTION = "My e-mail is ann@example.com and my server is 192.168.0.7. Repeat my e-mail and my server."

RAILS = """
models: []
instructions:
  - type: general
    content: You are a help desk. Answer in one short sentence.
"""


def with_pii_middleware(model: ChatMARA) -> Any:
    """An agent whose model sees neither addresses nor card numbers; one that names an address is masked, too."""
    return create_agent(
        model,
        middleware=[
            PIIMiddleware("email", strategy="redact", apply_to_input=True, apply_to_output=True),
            PIIMiddleware("ip", strategy="mask", apply_to_input=True, apply_to_output=True),
        ],
    )


def with_nemo(model: ChatMARA) -> str | None:
    """The same model behind NeMo Guardrails; None where that is not installed.

    `LLMRails` takes any chat model of LangChain; rails of your own go into the configuration.
    """
    try:
        from nemoguardrails import LLMRails, RailsConfig
    except ImportError:
        print("NeMo Guardrails is not installed: pip install nemoguardrails")
        return None
    rails = LLMRails(RailsConfig.from_content(yaml_content=RAILS), llm=model)
    answer = rails.generate(messages=[{"role": "user", "content": "How do I reset my password?"}])
    return str(answer["content"])


def main(head: str | None = None) -> dict[str, Any]:
    """One message full of personal data, through the guarded agent.

    Args:
        head: A trained head.
    """
    model = ChatMARA("smollm2", head=head, max_tokens=30)
    print(f"> {QUESTION}\n")
    messages = with_pii_middleware(model).invoke({"messages": [("human", QUESTION)]})["messages"]
    print(f"the model read: {messages[0].text}\nit answered:    {messages[-1].text}\n")
    return {"read": messages[0].text, "answer": messages[-1].text, "nemo": with_nemo(model)}


if __name__ == "__main__":
    main(*sys.argv[1:])
