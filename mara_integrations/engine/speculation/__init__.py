"""Drafted tokens: where drafts come from, and when their cost pays."""
