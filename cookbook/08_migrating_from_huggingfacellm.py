"""From LlamaIndex' `HuggingFaceLLM` to `MARALLM`: the same model on the same machine, parameter by parameter.

    HuggingFaceLLM(...)                         MARALLM(...)
    ------------------------------------------  ----------------------------------------------------------------------
    model_name="org/model"                      "org/model", the first argument; a folder or a .gguf file too
    tokenizer_name="org/model"                  not needed: the tokenizer is the model's
    model=model, tokenizer=tokenizer            (model, tokenizer), as one argument
    device_map="cuda"                           device="cuda"; "auto" is CUDA, then MPS, then CPU
    device_map="auto" (several GPUs)            model_kwargs={"device_map": "auto"}
    model_kwargs={"torch_dtype": ...}           dtype="bfloat16"; "auto" is what the device is fast at
    model_kwargs={"quantization_config": ...}   the same
    tokenizer_kwargs={...}                      load the tokenizer yourself, and pass (model, tokenizer)
    max_new_tokens=256                          the same, or max_tokens=256; per call too
    generate_kwargs={"temperature": 0.7,        temperature=0.7, top_p=0.9, top_k=40, seed=1, each of them per call too;
      "top_p": 0.9, "do_sample": True}            temperature=0, the default, is greedy: there is no do_sample
    stopping_ids=[50278, 50279]                 stop=["<|im_end|>"]: strings, of any number of tokens; the end-of-turn
                                                  tokens of the model itself are known
    system_prompt="..."                         the same
    query_wrapper_prompt=PromptTemplate(...)    not needed: the model's chat template is used; completion_to_prompt=...
                                                  if you must
    is_chat_model=True                          not needed: always
    messages_to_prompt, completion_to_prompt    the same
    context_window=3900                         not needed: read from the model's configuration, and prompts are packed
                                                  into it with the model's own tokenizer

What changes beside the names: settings of a call take effect (there they are ignored), async calls leave the event loop
free, leaving a stream stops the generation, tools and structured output work (held to their schema by a grammar), the
weights are loaded on first use and shared by all objects that name them, and `raw` is a small dict with counts.

    python cookbook/08_migrating_from_huggingfacellm.py [head]
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Literal

from llama_index.core import PromptTemplate, Settings
from llama_index.core.llms import ChatMessage
from pydantic import BaseModel

from mara_integrations import MARALLM


class Place(BaseModel):
    """What a sentence says about a city."""

    city: Literal["Lima", "Oslo", "Rome"]
    continent: Literal["Africa", "America", "Asia", "Europe"]


def main(head: str | None = None) -> dict[str, Any]:
    """Do what one does with a `HuggingFaceLLM`, and three things that it does not do.

    Args:
        head: A trained head; the one parameter that has no counterpart there. Without it, the base model answers.
    """
    # Before:
    #   HuggingFaceLLM(
    #       model_name="HuggingFaceTB/SmolLM2-135M-Instruct", tokenizer_name="HuggingFaceTB/SmolLM2-135M-Instruct",
    #       context_window=8192, max_new_tokens=24, generate_kwargs={"do_sample": False}, device_map="cpu",
    #       system_prompt="Answer in one sentence.", is_chat_model=True,
    #   )
    llm = MARALLM("smollm2", head=head, max_new_tokens=24, system_prompt="Answer in one sentence.")
    Settings.llm = llm
    found: dict[str, Any] = {"context_window": llm.metadata.context_window}

    found["complete"] = llm.complete("What is the capital of France?").text
    found["stream"] = "".join(part.delta for part in llm.stream_chat([ChatMessage("Name a colour.")]))

    # 1. Settings of one call: here a stop string and a length, there nothing happened.
    found["stopped"] = llm.complete("Count: 1, 2, 3,", max_tokens=12, stop=["8"]).text
    found["raw"] = llm.complete("Name a colour.", max_tokens=4).raw

    # 2. An object: every reply is JSON of this class, also from a model of 135M parameters.
    text = "Oslo is a city in Europe."
    found["object"] = llm.structured_predict(Place, PromptTemplate("{text}"), llm_kwargs={"max_tokens": 60}, text=text)

    # 3. Async calls: both are decoded together while the event loop stays free.
    async def both() -> list[str]:
        answers = await asyncio.gather(llm.acomplete("Name an animal."), llm.acomplete("Name a fruit."))
        return [answer.text for answer in answers]

    found["async"] = asyncio.run(both())
    for name, value in found.items():
        print(f"{name:>14}  {value!r}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
