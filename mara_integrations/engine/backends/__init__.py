"""Run the base model: the protocol of a backend, its implementations, the KV store, attention, kept prefixes.

Knows no heads and no requests.
"""
