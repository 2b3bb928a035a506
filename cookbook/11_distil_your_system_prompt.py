"""Distil your system prompt: what it says about manner becomes a head, what it says about facts stays a prompt.

System prompts of applications grow: be friendly, use plain words, no lists, close with a question. Every call pays for
these tokens. What they ask of the manner of a reply can go into a head. Facts can't: a head chooses among the model's
own candidates, and a closing time that the model has not been told is not among them. So cut the prompt in two. The
facts stay as `system_prompt` and are recorded with the head; the rest is the principle. On the command line:

    mara-tools train --system-prompt "You answer for Fern & Fig, ..." --principle-file manner.txt \\
        --data prompts.jsonl --output heads/shop

Take `--data` from your logs: questions as your users ask them are what the head will meet. Without it, it learns from
prompts of many kinds that come with the package. Some rules of thumb:

- Where one wish matters more, give each as a `--principle` of its own, with weights:
  `--principle "Use plain words.=2" --principle "End with a question."`.
- What decides in a few places, such as a last line or a date format, is a rule: `--forbid`, `--require`, or `never`.
- The table at the end has the whole prompt, the head and both. If the head does not reach the prompt there, keep the
  prompt, or both.

    python cookbook/11_distil_your_system_prompt.py [folder]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from mara_integrations import MARAEngine
from mara_integrations.progress import ConsoleReporter
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.run import train

FACTS = "You answer for Fern & Fig, a plant shop. It is open from nine to six, on Sundays from noon."
MANNER = """You are friendly and patient. You use plain words and short sentences, as in a talk over the counter.
You never sound like an advertisement, and you do not use lists.
You take the worries of people about their plants seriously, and you encourage beginners."""


def main(folder: str = "heads/shop", **settings: Any) -> dict[str, Any]:
    """Make a head of the manner, and answer with the whole prompt, and with the head and the facts alone.

    Args:
        folder: Folder for the head.
        **settings: Further fields of `TrainConfig`, as `model` and `data`.
    """
    config = TrainConfig.of(output=Path(folder), system_prompt=FACTS, **settings)
    result = train(config, principle=MANNER, reporter=ConsoleReporter(Console()))

    engine = MARAEngine(config.model, folder, max_new_tokens=40)
    ways: dict[str, Any] = {
        "whole prompt": {"strength": 0.0, "system_prompt": f"{FACTS}\n\n{MANNER}"},
        "facts and head": {},  # the head brings the system prompt that it was trained with
    }
    replies = {way: engine.generate("My first cactus looks sad. What do I do?", **more) for way, more in ways.items()}
    for way, reply in replies.items():
        print(f"\n{way}, {reply.prompt_tokens} tokens of prompt: {reply.text}")
    tokens = {way: reply.prompt_tokens for way, reply in replies.items()}
    return {"table": result.head.config.metrics.get("prompt_baseline"), "prompt_tokens": tokens}


if __name__ == "__main__":
    main(*sys.argv[1:])
