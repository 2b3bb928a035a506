"""Base models: what a name means, loading, devices, `.gguf` files, int8 weights, several processes (experimental).

Heads are in `heads`, running a model in `engine.backends`.
"""
