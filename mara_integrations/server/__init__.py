"""An HTTP server that speaks OpenAI's API: chats and completions of one model and its heads.

It checks requests, calls `MARAEngine` and writes answers; decoding is in `engine`. The client side is `remote`.
"""

from mara_integrations.server.app import create_app

__all__ = ["create_app"]
