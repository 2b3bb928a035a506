"""Regular expressions that a reply must not match, compiled to automata that read it character by character.

Nothing here knows tokens or a model: which tokens a state refuses is found by `engine.refusals`.
"""
