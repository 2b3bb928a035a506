"""Base models: resolving names, loading, devices, `.gguf` files, int8 weights, several processes (experimental).

Heads are in `heads`, running a model in `engine.backends`.
"""
