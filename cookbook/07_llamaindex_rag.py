"""Questions about a company's handbook: LlamaIndex retrieves, a local model answers, a head keeps to the house style.

The handbook talks to its reader ("you have 28 days"), and a small model copies that from its context. The house style of
the answers forbids it. No prompt would hold a model of 135M parameters to that; a head does, one token at a time. It is
trained here in seconds, on the very prompts that the query engine sends, since a head is at home where it was trained.
Nothing leaves this machine: retrieval is BM25, which counts words and needs no embedding model.

    pip install llama-index-retrievers-bm25
    python cookbook/07_llamaindex_rag.py [head]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llama_index.core import PromptTemplate, Settings, SimpleDirectoryReader
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.retrievers.bm25 import BM25Retriever

from mara_integrations import MARALLM
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.run import train

HANDBOOK = Path(__file__).parent / "data" / "handbook"
FORBIDDEN = ("you", "your", "yours", "yourself")
QUESTION = "How many days of vacation are there in a year?"
# Others than the one asked below: the head has to be right where it was not trained.
PRACTICE = [
    "What is handed out on the first day?",
    "What happens to a broken laptop?",
    "Until when must a receipt be sent?",
    "How much may a meal with a client cost?",
    "On which day is everybody in the office?",
    "What must be done when a badge is lost?",
    "Which days off can be kept for the next year?",
    "What is the rule for flights?",
]
# Shorter than LlamaIndex' own: a small model loses sight of a question behind a page of instructions.
ASK = PromptTemplate("{context_str}\n\nAnswer in one sentence: {query_str}")


def make_retriever() -> BM25Retriever:
    """The one passage of the handbook that shares the rarest words with a question."""
    documents = SimpleDirectoryReader(str(HANDBOOK)).load_data()
    passages = SentenceSplitter(chunk_size=256, chunk_overlap=0).get_nodes_from_documents(documents)
    return BM25Retriever.from_defaults(nodes=passages, similarity_top_k=1)


def train_head(retriever: BM25Retriever, folder: str) -> str:
    """A head that refuses the forbidden words, fitted to what the model writes to prompts like the query engine's."""
    prompts = Path(folder) / "prompts.jsonl"
    with prompts.open("w", encoding="utf-8") as file:
        for question in PRACTICE:
            context = retriever.retrieve(question)[0].get_content()
            file.write(json.dumps({"prompt": ASK.format(context_str=context, query_str=question)}) + "\n")
    head = Path(folder) / "head"
    # Little of everything, so that it takes seconds; `make demo` trains one in earnest.
    little: dict[str, Any] = {"max_reply_tokens": 24, "replies_each": 2, "correction_rounds": 1, "eval_prompts": 0}
    train(TrainConfig(model="smollm2", data=prompts, output=head, forbid=FORBIDDEN, inner_size=64, epochs=8, **little))
    return str(head)


def main(head: str | None = None) -> dict[str, str]:
    """Ask one question without a head and with it.

    Args:
        head: A trained head; without one, one is trained first.
    """
    retriever = make_retriever()
    with TemporaryDirectory() as folder:
        head = head or train_head(retriever, folder)
        # The two share one loaded model. Prompts are packed by its own tokenizer: nothing has to be set for that.
        gated = MARALLM("smollm2", head=head, max_tokens=40).load()
    base = gated.model_copy(update={"head": None})
    answers = {}
    Settings.llm = gated  # what chat engines and agents made later would use
    for name, llm in (("base", base), ("gated", gated)):
        engine = RetrieverQueryEngine.from_args(retriever, llm=llm, text_qa_template=ASK, streaming=True)
        answer = engine.query(QUESTION)
        print(f"\n{name}: ", end="")
        for piece in answer.response_gen:
            print(piece, end="", flush=True)
            answers[name] = answers.get(name, "") + piece
        answers["source"] = answer.source_nodes[0].metadata["file_name"]
    print(f"\n\nfrom {answers['source']}")
    return answers


if __name__ == "__main__":
    main(*sys.argv[1:])
