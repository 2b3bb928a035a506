"""The slow reference, which recomputes the whole sequence for every candidate, and checks of the engine against it.

`MARAEngine.verify` and the tests use it; no request is served by it.
"""
