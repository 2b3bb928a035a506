"""Heads: their networks and config, composing and merging, the folder on disk, the Hub, the cache in memory.

A head may come from anybody, so everything that is read is checked here. Base models are in `models`, decoding in
`engine`.
"""
