"""Data of `mara-tools demo`: preferences for a house style, and prompts to judge it by; README.md describes them.

What the demo does with them is in `mara_integrations.cli.demo`.
"""

from __future__ import annotations

from pathlib import Path

TRAIN = Path(__file__).parent / "house_style_train.jsonl"
TEST = Path(__file__).parent / "house_style_test.jsonl"

# A reply that keeps to the style has none of these.
WORDS = ("you", "your", "yours", "yourself", "yourselves")
