"""Replies as tokens, hidden states and accept/reject decisions: generated here or on Ray, or read from given texts.

Nothing here knows a training run, a reward or a method.
"""
