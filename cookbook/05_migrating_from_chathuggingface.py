"""From `ChatHuggingFace(llm=HuggingFacePipeline(...))` to `ChatMARA`, parameter by parameter.

    before                                                      now
    ----------------------------------------------------------  ----------------------------------------------------
    llm = HuggingFacePipeline.from_model_id(model_id="...",     ChatMARA("...")
        task="text-generation"); ChatHuggingFace(llm=llm)
    HuggingFacePipeline(pipeline=pipeline(model=m, tokenizer=t))  ChatMARA((m, t))
    device=0, device_map="cuda"                                 device="cuda"; "auto" finds a GPU
    model_kwargs={"dtype": torch.bfloat16}                      dtype="bfloat16"; "auto" is what the device is fast at
    model_kwargs={"device_map": ..., "quantization_config": ..}  model_kwargs={...}, the same
    model_kwargs={"revision": "..."}                            revision="..."
    pipeline_kwargs={"max_new_tokens": 100}                     max_tokens=100, also max_new_tokens=100
    pipeline_kwargs={"do_sample": False}                        temperature=0, the default
    pipeline_kwargs={"do_sample": True, "temperature": 0.7}     temperature=0.7
    pipeline_kwargs={"top_k": 40, "top_p": 0.9}                 top_k=40, top_p=0.9
    pipeline_kwargs={"return_full_text": False}                 gone: the prompt is never part of the answer
    pipeline_kwargs={"repetition_penalty": 1.1}                 none: train a head for it
    transformers.set_seed(0)                                    seed=0, per call too
    batch_size=8                                                gone: `batch` decodes all inputs together
    llm.invoke(..., stop=["\n"])        ignored                 the same, and it stops
    llm.invoke(..., temperature=0.3)    ignored                 the same, and it takes effect; so does any setting
    llm.bind_tools(tools)               never reach the model   the same; calls are held to the tools' schemas
    llm.bind_tools(two, tool_choice="any")  ValueError          the same, and a call comes
    a ToolMessage in the conversation   ValueError              understood, in the template's own form
    llm.with_structured_output(Class)   NotImplementedError     the same; a grammar holds the answer to the class
    await llm.ainvoke(...), astream     raise                   the same; the event loop is never blocked
    usage_metadata, response_metadata   empty                   token counts, model name, finish reason, gate counts
    llm.get_num_tokens(...)             GPT-2's tokens          the model's own

New: `head="..."`, a trained head that judges every token; `strength=` turns it up and down.

    python cookbook/05_migrating_from_chathuggingface.py [head]
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Literal

from langchain_core.tools import tool
from pydantic import BaseModel

from mara_integrations import ChatMARA


@tool
def opening_hours(day: Literal["Saturday", "Sunday"]) -> str:
    """Opening hours of the shop on a day."""
    return {"Saturday": "9 to 17", "Sunday": "closed"}[day]


class Season(BaseModel):
    """A season."""

    name: Literal["spring", "summer", "autumn", "winter"]


def main(head: str | None = None) -> dict[str, Any]:
    """Run what did not run before.

    Args:
        head: A trained head.
    """
    llm = ChatMARA("smollm2", head=head, max_tokens=24)

    answer = llm.invoke("Name three colours.", stop=["\n"], temperature=0.3, seed=0)
    assert answer.usage_metadata is not None
    print(f"stop, temperature, seed:  {answer.text!r}, {answer.usage_metadata['output_tokens']} tokens")

    (call,) = (
        llm.bind_tools([opening_hours], tool_choice="any").invoke("Are you open on Sunday?", max_tokens=60).tool_calls
    )
    print(f"tools:                    {call['name']}({call['args']})")

    season = llm.with_structured_output(Season, max_tokens=80).invoke("When does snow fall?")
    print(f"structured output:        {season!r}")

    async def two_at_once() -> list[str]:
        answers = await asyncio.gather(
            *(llm.ainvoke(f"What is a {noun}?", max_tokens=12) for noun in ("chair", "lamp"))
        )
        return [message.text for message in answers]

    together = asyncio.run(two_at_once())
    print(f"async, decoded together:  {together}")
    return {"answer": answer, "call": call, "season": season, "together": together}


if __name__ == "__main__":
    main(*sys.argv[1:])
