"""The training methods: one loop a file, to be read from top to bottom.

Each fits a head in place and returns what it measured. What all methods share is in the folders below.
"""
