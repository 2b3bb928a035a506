"""From preferences to a chain in minutes on a laptop: train a head, see what it does, plug it into both frameworks.

The taste is a house style: a help desk that never says "you" to its reader. The base model, SmolLM2-135M-Instruct,
keeps to it in about half of its answers. Nothing of the model is changed; a head of a few MB refuses single tokens.

    make demo
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console

DATA = Path(__file__).parent / "data"
WORDS = ("you", "your", "yours", "yourself")
QUESTION = "How do I keep indoor plants alive while on holiday?"

console = Console(highlight=False)


def run(*command: str) -> None:
    """Show a command, and run it as a user would."""
    console.print(f"\n[bold green]$ {shlex.join(command)}[/]\n", soft_wrap=True)
    subprocess.run([sys.executable, "-m", "mara_integrations", *command[1:]], check=True)


def ask_langchain(head: str) -> str:
    """One question through a LangChain chain."""
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate

    from mara_integrations import MARALLM

    llm = MARALLM(model="smollm2", head=head, max_tokens=60)
    prompt = ChatPromptTemplate.from_messages([("human", "{question}")])
    return (prompt | llm | StrOutputParser()).invoke({"question": QUESTION})


def ask_llama_index(head: str) -> str:
    """The same question through LlamaIndex."""
    from llama_index.core import PromptTemplate, Settings

    from mara_integrations import MARALLM

    Settings.llm = MARALLM(model="smollm2", head=head, max_tokens=60)
    return Settings.llm.predict(PromptTemplate("{question}"), question=QUESTION)


def main(output: str = "runs/house-style", *extra_train: str, eval_prompts: int | None = None) -> None:
    """Train, evaluate, ask.

    Args:
        output: Folder of the head and the report.
        *extra_train: More flags for `mara-tools train`.
        eval_prompts: Evaluate on the first prompts only.
    """
    console.rule("1. Train a head on preferences")
    forbid = [flag for word in WORDS for flag in ("--forbid", word)]
    data, length = str(DATA / "house_style_train.jsonl"), ("--max-reply-tokens", "40", "--eval-prompts", "0")
    run("mara-tools", "train", "--data", data, *forbid, "--output", output, *length, *extra_train)

    console.rule("2. Compare base and gated answers on prompts it has never seen")
    limit = () if eval_prompts is None else ("--limit", str(eval_prompts))
    report = ("--max-new-tokens", "40", "--examples", "4", "--report", f"{output}/report.html")
    run("mara-tools", "eval", "--head", output, "--data", str(DATA / "house_style_test.jsonl"), *report, *limit)

    console.rule("3. Ask through LangChain and LlamaIndex")
    console.print(f"\n[bold]{QUESTION}[/]\n")
    console.print(f"[cyan]LangChain[/]   {ask_langchain(output)}\n", markup=True)
    console.print(f"[cyan]LlamaIndex[/]  {ask_llama_index(output)}\n", markup=True)
    console.rule("Next")
    activate = "" if os.environ.get("VIRTUAL_ENV") else "source .venv/bin/activate\n"
    console.print(
        f"{activate}mara-tools chat --head {output}                      # /base shows what the model alone would say\n"
        f"mara-tools explain --head {output} 'How do I repot a cactus?'\n"
        f"mara-tools train --help                                  # pairs, thumbs, a reward function, a rule\n"
        f"open {output}/report.html                                # every answer, every rejected token",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
