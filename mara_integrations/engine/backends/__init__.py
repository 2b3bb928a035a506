"""How the base model is run: the protocol of a backend, its implementations, the KV store, attention, kept prefixes.

Knows no heads and no requests.
"""
