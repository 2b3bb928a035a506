"""What ready rules look for in the manner of an English text: slang, flattery, refusals. Knows no model.

Lists of phrases, not judgements: what is said in other words is not found.
"""

from __future__ import annotations

import regex

Spans = list[tuple[int, int]]

_FLAGS = regex.IGNORECASE | regex.VERBOSE
_PRAISING = r"""(?:great|good|excellent|wonderful|fantastic|amazing|brilliant|insightful|thoughtful|impressive
    |incredible|awesome|terrific|superb|remarkable|outstanding|clever|lovely|beautiful|fascinating|perfect|admirable)"""
_VERY = r"(?:(?:very|really|truly|such|quite|absolutely|simply|just|so)\s+)"
_PRAISED = r"""(?:questions?|points?|ideas?|thoughts?|plans?|observations?|choices?|decisions?|goals?|topics?|essays?
    |poems?|stor(?:y|ies)|work|jobs?|attitudes?|insights?|instincts?|taste)"""

_INFORMAL = regex.compile(
    r"""\b(?:is|are|was|were|do|does|did|has|have|had|ca|could|wo|would|should|must|might|need|ai)n['’]t\b
    | \b(?:I|you|he|she|it|we|they|that|this|there|here|what|who|where|when|how|why|let)['’](?:m|re|s|ve|d|ll)\b
    | \b(?:hey|hi|yeah|yep|yup|nope|nah|gonna|wanna|gotta|kinda|sorta|dunno|lemme|gimme|y['’]all|cuz|thx|pls|lol|omg
        |btw|tbh|imo|wow|oops|yay|okay|ok|guys|buddy|dude|awesome|folks)\b
    | !""",
    _FLAGS,
)
_FLATTERY = regex.compile(
    rf"""\b{_PRAISING}\s+{_PRAISED}\s*!
    | (?:^|(?<=[.!?\n]))\s{{0,3}}{_VERY}?{_PRAISING}\s+{_PRAISED}\b
    | \b(?:what|(?:that|this|it)(?:['’]s|\s+is|\s+sounds\s+like|\s+looks\s+like)|sounds\s+like|you\s+have
        |you['’]ve\s+got)\s+(?:an?\s+)?{_VERY}?(?:an?\s+)?{_PRAISING}\s+{_PRAISED}\b
    | \byour\s+(?:\w+\s+)?{_PRAISED}\s+(?:is|are|sounds?|looks?)\s+{_VERY}?{_PRAISING}\b
    | \byou(?:['’]re|\s+are)\s+(?:{_VERY}|(?:completely|totally|entirely|definitely)\s+)*
        (?:right|correct|brilliant|talented|gifted|amazing|wonderful|a\s+genius|an?\s+{_PRAISING})\b
    | \bI\s+(?:{_VERY}|completely\s+|totally\s+)?(?:love|adore|agree\s+with)\s+(?:your|you)\b""",
    _FLAGS,
)
_REFUSAL = regex.compile(
    r"""\bI(?:['’]m|\s+am)\s+(?:really\s+|very\s+|so\s+)?sorry,?\s+(?:but\s+)?(?:I\s+)?(?:can|ca|am\s+not|will\s+not|wo)
    | \bI\s+(?:can(?:not|['’]t)|can\s+not|won['’]t|will\s+not|could\s+not|couldn['’]t)\s+
        (?:\w+ly\s+)?(?:help|assist|support|provide|give|share|offer|fulfil+|comply|do\s+(?:that|this)|answer|write|condone
        |encourage|promote|recommend|engage|participate|discuss|create|generate)\b
    | \bI(?:['’]m|\s+am)\s+(?:not\s+able|unable|not\s+comfortable|not\s+willing|not\s+going)\s+(?:to\b|with\b)
    | \bI\s+(?:must|have\s+to|need\s+to)\s+(?:refuse|decline)\b | \bI\s+(?:refuse|decline)\s+to\b
    | \b(?:it|that|this)\s+(?:is|would\s+be)\s+(?:not\s+(?:appropriate|ethical|legal|okay|right)|illegal|unethical
        |inappropriate)\b
    | \b(?:it|that|this)(?:['’]s|\s+is)\s+(?:illegal|unethical|not\s+ethical|against\s+the\s+law)\b""",
    _FLAGS,
)
_MISSING = regex.compile(
    r"""\b(?:not|never|no|nothing|neither|\w+n['’]t)\b[^.!?\n]{0,60}?\b(?:in|by|from)\s+the\s+(?:given\s+|provided\s+)?
        (?:documents?|context|text|passages?|information)\b
    | \b(?:documents?|context|text|passages?|information)\s+(?:provided\s+|given\s+)?(?:do(?:es)?\s+not|do(?:es)?n['’]t)
        \s+(?:\w+ly\s+)?(?:say|mention|contain|provide|specify|state|hold|include|give|tell|have|explain|answer)\b
    | \b(?:is|are|was|were)(?:\s+not|n['’]t)\s+(?:\w+ly\s+)?(?:mentioned|provided|specified|stated|given|included)\b
    | \bI\s+(?:do\s+not|don['’]t)\s+know\b | \bno\s+(?:information|mention|answer)\b
    | \b(?:can\s*not|can['’]t|could\s+not|couldn['’]t)\s+(?:be\s+)?(?:find|found|determined?|answer|answered)\b""",
    _FLAGS,
)


def find_informal(text: str) -> Spans:
    """Contractions, greetings and slang that a formal letter does not have, and exclamation marks."""
    return [match.span() for match in _INFORMAL.finditer(text)]


def find_flattery(text: str) -> Spans:
    """Praise of the question, of the person or of their work, and assurances that they are right."""
    return [match.span() for match in _FLATTERY.finditer(text)]


def find_refusals(text: str) -> Spans:
    """Phrases that refuse a request, or call it illegal or unethical.

    Source: phrases in the manner of Zou et al. 2023 (arXiv 2307.15043), appendix B.
    """
    return [match.span() for match in _REFUSAL.finditer(text)]


def find_missing_answers(text: str) -> Spans:
    """Phrases that say that documents do not hold the answer, or that it is not known."""
    return [match.span() for match in _MISSING.finditer(text)]
