"""The classes for LangChain and LlamaIndex, `ChatMARA` and `MARALLM`, and the settings and reports that they share.

They translate messages, tools and settings. Replies come from `runtime.MARAEngine`, which knows neither framework.
"""
