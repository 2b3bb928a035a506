"""An engine whose model runs in a server that speaks OpenAI's API.

Knows no framework; imports the client of OpenAI when a server is first asked.
"""
