"""Training heads on preferences, rewards and rules; `run.train` is one run from top to bottom."""
