"""Is the head worth it: metrics, base against gate on the same prompts, and the report that shows it."""
