"""The language of a text, by the detector py3langid, an optional dependency."""

from __future__ import annotations

import importlib
import math
from typing import Any

from mara_integrations.errors import ConfigError, MissingExtraError


def _log_scores(text: str) -> dict[str, float]:
    """Return the detector's log-probability of a text in each language, up to a constant."""
    try:
        detector: Any = importlib.import_module("py3langid.langid")
    except ImportError as error:
        raise MissingExtraError(
            "the detection of languages needs py3langid", hint="pip install 'mara-integrations[language]'"
        ) from error
    return {str(language): float(score) for language, score in detector.rank(text)}


def checked_language(code: str) -> str:
    """Return a code of ISO 639-1 in lower case, without a region.

    Raises:
        ConfigError: If the detector does not know it.
        MissingExtraError: If py3langid is not installed.
    """
    plain = code.strip().lower().replace("_", "-").partition("-")[0]
    known = sorted(_log_scores("a"))
    if plain not in known:
        raise ConfigError(f"language {code!r} is not known", hint=f"known are {', '.join(known)}")
    return plain


def language_probability(text: str, code: str) -> float:
    """Return the probability that a text is in a language; 0 for a text without letters.

    Raises:
        ConfigError: If the detector does not know the language.
        MissingExtraError: If py3langid is not installed.
    """
    code = checked_language(code)
    return _probabilities(text).get(code, 0.0)


def same_language_probability(text: str, other: str) -> float | None:
    """Return the probability that two texts are in the same language; None if the second has no letters.

    Raises:
        MissingExtraError: If py3langid is not installed.
    """
    if not (expected := _probabilities(other)):
        return None
    found = _probabilities(text)
    return sum(probability * found.get(code, 0.0) for code, probability in expected.items())


def _probabilities(text: str) -> dict[str, float]:
    """Return the probability of each language; empty for a text without letters."""
    if not any(character.isalpha() for character in text):
        return {}
    scores = _log_scores(text)
    best = max(scores.values())
    weights = {code: math.exp(score - best) for code, score in scores.items()}
    total = sum(weights.values())
    return {code: weight / total for code, weight in weights.items()}
