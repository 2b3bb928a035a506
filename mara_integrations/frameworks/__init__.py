"""LangChain and LlamaIndex: `ChatMARA`, `MARALLM`, and the settings and reports that they share.

Decoding is below, in `runtime` and `engine`.
"""
