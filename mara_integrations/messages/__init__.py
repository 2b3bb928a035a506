"""Conversations, and how they become the token ids of a prompt.

Knows no model and no framework, and imports neither torch nor transformers.
"""

from mara_integrations.messages.conversation import Conversation, Message, Prompt, Role, Tool, ToolCall
from mara_integrations.messages.encoder import PromptEncoder

__all__ = ["Conversation", "Message", "Prompt", "PromptEncoder", "Role", "Tool", "ToolCall"]
