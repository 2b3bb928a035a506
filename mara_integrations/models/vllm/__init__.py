"""Base models on vLLM in this process: settings, and how they are loaded."""
