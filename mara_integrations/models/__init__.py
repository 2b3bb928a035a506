"""The base model: resolving a name, loading, `.gguf` files, int8 weights, options for `from_pretrained`, processes.

Knows no heads.
"""
