"""Gated decoding. `worker` takes requests from any thread, and `decoder` decodes all of them together, step by step.

`candidates` chooses what a head judges, `gate` is the rule that turns its scores into a token, and `backends` run the
base model. Nothing here knows LangChain, LlamaIndex or HTTP, and heads are loaded elsewhere, by `heads`.
"""
