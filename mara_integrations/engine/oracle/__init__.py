"""The slow reference that recomputes every candidate, and the comparison of the engine with it."""
