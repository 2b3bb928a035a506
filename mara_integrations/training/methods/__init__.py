"""The training methods, one loop a file, read from top to bottom."""
