"""An HTTP server with OpenAI's interface: chats and completions of a model and its heads."""

from mara_integrations.server.app import create_app

__all__ = ["create_app"]
