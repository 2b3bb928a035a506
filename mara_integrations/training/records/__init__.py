"""Files of a run: its metrics and trackers, stored work, and hidden states that do not fit into memory.

Nothing here knows what the data means.
"""
