"""From tokens to a reply: text and stop strings, reasoning, tool calls, and the forms a reply may be held to.

Knows no model and no head.
"""
