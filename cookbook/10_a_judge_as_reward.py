"""A judge as reward: a rubric in words, a chat model that scores by it, and a head that learns what it likes.

Where no function can tell a good reply, a language model often can: it reads a rubric, the prompt and the reply, and
gives 0 to 10. Any chat model of LangChain judges, one behind an API or one of your own. On the command line:

    mara-tools train --data prompts.jsonl --reward 'llm:openai:gpt-5-mini?rubric=rubric.md' --output heads/helpful \\
        --max-judge-calls 2000 --dry-run

`--dry-run` says how many calls it will take at most, and asks twice to see that the judge works. What it says is kept
by content, so that nothing is paid twice: a run that was stopped, by you or by `--max-judge-calls`, goes on where it
was when the same command is given again. Some rules of thumb:

- Trust a judge after it has agreed with people. If `--data` has preference pairs, the share of pairs that the judge
  orders as they do is printed before the training.
- `&mode=pairs` compares each reply with the base model's, in both orders, instead of scoring it. It takes twice the
  calls, and helps where a judge gives nearly all replies the same score.
- A local model costs nothing but time: `llm:mara:smollm2?structured=yes`. `structured` holds it to the form of an
  answer; whether a small one judges well, its agreement with people tells.
- A head may learn what a judge likes beside the point, such as length. Let `--judge length` report it, and look at the
  replies.

Here the judge is scripted, so that the recipe runs anywhere; pass a chat model of your own instead.

    python cookbook/10_a_judge_as_reward.py [folder]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from rich.console import Console

from mara_integrations.progress import ConsoleReporter
from mara_integrations.rewards import llm_judge
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.run import train

RUBRIC = """
A good reply gives the reader something to do: steps, in short sentences.
It has no preamble, and it does not praise the question.
"""

PROMPTS = [
    f"How do I {task}?"
    for task in (
        "keep bread fresh", "repot a cactus", "sharpen a knife", "fix a flat tyre", "learn to swim", "write a letter",
        "clean a window", "save electricity", "sleep better", "paint a door", "train a dog", "plan a garden",
        "boil an egg", "tie a tie", "remove a stain", "find a flat", "pack a suitcase", "read faster",
        "grow tomatoes", "hang a picture", "stop hiccups", "cut an onion", "iron a shirt", "make a budget",
    )
]  # fmt: skip


class ScriptedJudge(BaseChatModel):
    """Stands in for `ChatOpenAI(model=...)` and the like: it likes short words and sentences, and no preamble."""

    num_calls: int = 0

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        self.num_calls += 1
        found = re.search(r"<reply>\n(.*)\n</reply>", str(messages[-1].content), re.DOTALL)
        reply = found[1] if found else ""
        per_sentence = len(reply.split()) / max(1, len(re.findall(r"[.!?:\n]+", reply)))
        longest = max(map(len, reply.split()), default=0)
        score = round(11 - per_sentence / 4 - longest / 3 - 3 * bool(re.match(r"(Great|Sure|What a)", reply)))
        said = f"Short words in short sentences matter.\nScore: {max(0, min(10, score))}"
        return ChatResult(generations=[ChatGeneration(message=AIMessage(said))])


def main(folder: str = "heads/to-the-point", judge: BaseChatModel | None = None, **settings: Any) -> dict[str, Any]:
    """Train a head on a judge's scores.

    Args:
        folder: Folder for the head.
        judge: The chat model that judges.
        **settings: Further fields of `TrainConfig`, as `model`.
    """
    model = judge or ScriptedJudge()
    reward = llm_judge(model, RUBRIC, name="my-judge")  # the name says which model it is: its scores are kept by it
    config = TrainConfig.of(output=Path(folder), **{"max_judge_calls": 3000, **settings})
    rows = [{"prompt": prompt} for prompt in PROMPTS]

    result = train(config, data=rows, reward=reward, judge="length", reporter=ConsoleReporter(Console()))

    assert result.evaluation is not None
    scores = {name: (found.base_mean, found.gated_mean) for name, found in result.evaluation.rewards.items()}
    print(f"\nscores of base model and head: {scores}")
    return {"scores": scores, "calls": getattr(model, "num_calls", None)}


if __name__ == "__main__":
    main(*sys.argv[1:])
