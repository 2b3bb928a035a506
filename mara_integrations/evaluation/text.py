"""Make text that a model wrote safe to show: a picture stands for each control character."""

from __future__ import annotations

from mara_integrations.evaluation.marks import Rejected


def visible(text: str) -> str:
    """Return the text with a picture in place of each control character; line breaks and tabs stay."""
    return "".join(c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") else _picture(c) for c in text)


def _picture(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


def struck_text(item: Rejected) -> str:
    """Return the text of a rejected candidate, in one line."""
    return visible(item.text).replace("\n", "⏎").replace("\t", "⇥")


def score_text(value: float | None) -> str:
    """Return a score of a reward in words or three digits."""
    return "no opinion" if value is None else f"{value:.3g}"
