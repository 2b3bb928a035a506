"""Answers from the documents, and "it is not in the documents" where they hold none: a head for a query engine.

A small model answers from what it happens to know, and it always answers. This script trains a head that prefers what
the retrieved passages say. All it needs are questions, each with the passages that your retriever finds; answers only
serve to judge. Every question is asked twice: with its passages, and with those of another question. Where the passages
are the right ones, the head learns what they change against the question alone (context-aware decoding, but without a
second forward for each token). Where they are not, it learns to say that there is no information about this, or what
`missing_answer` names. You may add questions that your documents do not answer, each with the passages that your
retriever finds all the same and a column `answerable` that is false. On the command line, `context` being the column
of the passages, a text or a list:

    mara-tools train --recipe from-context --data questions.jsonl --output heads/handbook \\
        --context-template "$(cat template.txt)"

Give the prompt of your query engine as the template, with LlamaIndex's own names `{context_str}` and `{query_str}`;
without it, LlamaIndex's default is taken. `mara-tools eval --head heads/handbook --data other-questions.jsonl` asks in
the same way. The table at the end has the head beside the sentence as a system prompt: `answered` is the share of the
answer's words in replies to questions with the right passages, `admitted` the share of replies that own up where they
are wrong. Look at both: a head that always declines is no help. The 24 questions here show how it goes; some hundreds
of your users' own make a head.

    pip install llama-index-retrievers-bm25
    python cookbook/12_answers_from_documents.py [folder]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from llama_index.core import PromptTemplate, SimpleDirectoryReader
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.retrievers.bm25 import BM25Retriever
from rich.console import Console

from mara_integrations import MARALLM
from mara_integrations.progress import ConsoleReporter
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.run import train

HANDBOOK = Path(__file__).parent / "data" / "handbook"
TEMPLATE = "Read this and answer the question.\n\n{context_str}\n\nQuestion: {query_str}"
QUESTIONS = {
    "When do I get a new laptop?": "every three years",
    "May I take a second screen home?": "ask the front desk",
    "Where do I bring a headset that is broken?": "room 12",
    "What do I get on my first day?": "a laptop, a headset and a badge",
    "Where do I send the photo of a receipt?": "the expenses inbox",
    "How much may a meal with a client cost?": "45 euros a person",
    "When do I get the money for my receipts back?": "with your next salary",
    "Whom do I ask before I spend more than 200 euros?": "your team lead",
    "How many days a week may I work from home?": "three",
    "On which day do all teams meet in the office?": "Tuesdays",
    "How many days a year may I work from another country?": "20",
    "How much does the company pay for my internet access?": "25 euros a month",
    "Whom do I call when I lose my badge?": "the security desk, extension 300",
    "What do I do when I leave my desk?": "lock your screen",
    "What do visitors wear?": "a yellow badge",
    "May I send a password by email?": "never",
    "How many days of vacation do I have?": "28",
    "When do I tell my team lead that I am ill?": "before ten",
    "Until when may I take days that are left?": "the end of March",
    "From which day on do I need a note from my doctor?": "the fourth",
    "In which class do I take the train?": "second",
    "How much may a hotel cost for a night?": "130 euros",
    "When may I take a taxi from the hotel to the client?": "after nine in the evening",
    "How do I pay for a trip?": "with the company card",
}


def make_retriever() -> BM25Retriever:
    """The one passage of the handbook that shares the rarest words with a question."""
    documents = SimpleDirectoryReader(str(HANDBOOK)).load_data()
    for document in documents:
        document.metadata = {}  # what is left here stands in the prompt
    passages = SentenceSplitter(chunk_size=256, chunk_overlap=0).get_nodes_from_documents(documents)
    return BM25Retriever.from_defaults(nodes=passages, similarity_top_k=1)


def main(folder: str = "heads/handbook", **settings: Any) -> dict[str, Any]:
    """Make a head of the handbook's questions, and ask one that it answers and one that it does not.

    Args:
        folder: Folder for the head.
        **settings: Further fields of `TrainConfig`, as `model`.
    """
    retriever = make_retriever()
    rows = []
    for question, answer in QUESTIONS.items():
        passages = [found.get_content() for found in retriever.retrieve(question)]
        rows.append({"prompt": question, "context": passages, "answer": answer})
    config = TrainConfig.of(output=Path(folder), recipe="from-context", context_template=TEMPLATE, **settings)
    result = train(config, data=rows, reporter=ConsoleReporter(Console()))

    llm = MARALLM(config.model, head=folder, max_tokens=30)
    engine = RetrieverQueryEngine.from_args(retriever, llm=llm, text_qa_template=PromptTemplate(TEMPLATE))
    asked = ("Whom do I call when I lose my laptop?", "Does the office have a swimming pool?")
    answers = {question: str(engine.query(question)) for question in asked}
    for question, answer in answers.items():
        print(f"\n{question}\n{answer}")
    return {"table": result.head.config.metrics.get("prompt_baseline"), "answers": answers}


if __name__ == "__main__":
    main(*sys.argv[1:])
