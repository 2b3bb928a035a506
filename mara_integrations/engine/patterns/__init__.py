"""Patterns that a reply must not match, followed character by character. Knows neither tokens nor a model."""
