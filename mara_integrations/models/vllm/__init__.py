"""Base models on vLLM in this process: their settings, and how they are loaded.

Requests are decoded by `engine.vllm_decoder`; the plug-in that gates inside of vLLM is the package's `vllm`.
"""
