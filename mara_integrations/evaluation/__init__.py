"""Evaluation of a head: both replies to the same prompts, metrics and intervals, the report.

Rewards are in `rewards`; what training measures while it runs is in `training.scoring`.
"""
