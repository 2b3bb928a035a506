"""Figures on replies and heads: rewards of partial text, held-out comparisons, strength, fitted reward models."""
