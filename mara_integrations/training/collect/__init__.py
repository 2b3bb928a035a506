"""What a method learns from, collected for a run: prompts, given replies, generated replies, and their rewards.

All of it is stored as it comes, so that an interrupted run continues where it was. Nothing here knows how a head is
fitted.
"""
