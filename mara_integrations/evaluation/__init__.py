"""Evaluation of a head: replies with and without it to the same prompts, metrics with intervals, reports.

Rewards are in `rewards`; what training measures while it runs is in `training.scoring`.
"""
