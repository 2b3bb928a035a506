"""Replies to learn from: generating them, here or on Ray, reading given ones, and the decisions in them."""
