"""Figures on replies and heads: rewards of partial text, held-out comparisons, scale, fitted reward models."""
