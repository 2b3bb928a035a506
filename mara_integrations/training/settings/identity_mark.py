"""The mark of settings that are not part of a run's identity."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OutsideIdentity:
    """Annotation of a setting that two runs with the same head may differ in.

    It is a path of this machine (what the file holds counts, by its hash), or has no influence on the head.
    """
