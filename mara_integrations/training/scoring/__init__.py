"""How good replies and heads are: rewards of unfinished replies, comparisons on held-out prompts, reward models.

Also the scale of a head within a KL budget.
"""
