"""From a sentence to a head: no data, no reward, no judge.

An application often has no preferences on file, only a sentence that stands in its system prompt. A small model half
ignores it, and it costs tokens in every call. Here it becomes a head. The model replies to 320 plain prompts that come
with the package, and reads its replies again with the sentence before them. What that changes in the probability of
each candidate, against a neutral sentence, is what the head learns. Of a mood, as here, the opposite teaches too: it is
read beside the neutral sentence. Of what to do, as "refuse what is harmful", it teaches the contrary: leave it out
there. The same on the command line:

    mara-tools train --principle "Be cheerful and enthusiastic." --against "Be gloomy and cold." --output heads/cheerful

Give `--data prompts.jsonl` with prompts of your own application, if there are any. The table at the end has the head
beside the sentence as a system prompt, and both together; it stands in the head's README.md, too. A judge there is only
reported: no training sees it.

    python cookbook/09_from_a_sentence_to_a_head.py [folder]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from mara_integrations import MARALLM
from mara_integrations.progress import ConsoleReporter
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.run import train

SENTENCE = "You are a cheerful, enthusiastic assistant. Everything you say is positive, warm and encouraging."
OPPOSITE = "You are a gloomy, pessimistic assistant. Everything you say is negative, cold and discouraging."


def main(folder: str = "heads/cheerful", **settings: Any) -> dict[str, Any]:
    """Make a head of the sentence, and answer a question with and without it.

    Args:
        folder: Folder for the head.
        **settings: Further fields of `TrainConfig`, as `model`.
    """
    config = TrainConfig.of(output=Path(folder), against=OPPOSITE, **settings)
    result = train(config, principle=SENTENCE, reporter=ConsoleReporter(Console()))

    llm = MARALLM(config.model, head=folder, max_tokens=40)
    question = "I have to move to another town for work."
    answers = {strength: llm.complete(question, strength=strength).text for strength in (0.0, 1.0)}
    for strength, answer in answers.items():
        print(f"\nstrength {strength:g}: {answer}")
    return {"table": result.head.config.metrics.get("prompt_baseline"), "answers": answers}


if __name__ == "__main__":
    main(*sys.argv[1:])
