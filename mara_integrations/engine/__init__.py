"""Gated decoding: token ids, states, candidates and heads; no text framework."""
