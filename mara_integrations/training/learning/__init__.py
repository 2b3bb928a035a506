"""Fitting a head to tensors: objectives, minibatch fits, actor-critic with its replay buffer, credit assignment.

Nothing here knows a training run, a file, a text or a reward function.
"""
