"""Questions about a company's handbook: LlamaIndex retrieves, a local model answers, a head judges each of its tokens.

Nothing leaves this machine. Retrieval is BM25, which counts words and needs no embedding model; the answer comes from a
model of 135M parameters. The handbook talks to its reader ("you have 28 days"), and the model copies that. `make demo`
trains a head that refuses the words "you" and "your": given its folder, the script answers without it and with it. A
head is most at home with prompts like those it was trained on; for such answers in earnest, train one on this query
engine's own prompts (`mara-tools train --help`).

    pip install llama-index-retrievers-bm25
    python cookbook/07_llamaindex_rag.py                     # the base model
    python cookbook/07_llamaindex_rag.py runs/house-style    # and what the head of `make demo` makes of it
"""

from __future__ import annotations

import sys
from pathlib import Path

from llama_index.core import PromptTemplate, SimpleDirectoryReader
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.retrievers.bm25 import BM25Retriever

from mara_integrations import MARALLM

HANDBOOK = Path(__file__).parent / "data" / "handbook"
QUESTION = "Whom do I call when I lose my badge?"
# Shorter than LlamaIndex' own: a small model loses sight of a question behind a page of instructions.
ASK = PromptTemplate("Read this and answer the question.\n\n{context_str}\n\nQuestion: {query_str}")


def make_retriever() -> BM25Retriever:
    """The one passage of the handbook that shares the rarest words with a question."""
    documents = SimpleDirectoryReader(str(HANDBOOK)).load_data()
    for document in documents:  # what is left here stands in the prompt, and a path tells a model nothing
        document.metadata = {"file_name": document.metadata["file_name"]}
    passages = SentenceSplitter(chunk_size=256, chunk_overlap=0).get_nodes_from_documents(documents)
    return BM25Retriever.from_defaults(nodes=passages, similarity_top_k=1)


def main(head: str | None = None) -> dict[str, str]:
    """Ask one question, without a head and with it.

    Args:
        head: A trained head; without one, the base model answers alone.
    """
    retriever = make_retriever()
    # Both share one loaded model. Prompts are packed by its own tokenizer: nothing has to be set for that.
    base = MARALLM("smollm2", max_tokens=30)
    models = {"base": base, "gated": base.model_copy(update={"head": head})} if head else {"base": base}
    found: dict[str, str] = {}
    print(QUESTION)
    for name, llm in models.items():
        engine = RetrieverQueryEngine.from_args(retriever, llm=llm, text_qa_template=ASK, streaming=True)
        answer = engine.query(QUESTION)
        print(f"\n{name}: ", end="")
        found[name] = ""
        for piece in answer.response_gen:
            print(piece, end="", flush=True)
            found[name] += piece
        found["source"] = answer.source_nodes[0].metadata["file_name"]
    print(f"\n\nfrom {found['source']}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
