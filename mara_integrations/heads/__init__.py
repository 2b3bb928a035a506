"""What a head is: the network and its config, composing, its folder on disk and on the Hub, caching, merging.

Knows no base model and no decoding.
"""
