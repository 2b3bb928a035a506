"""The checkable instructions of IFEval, by the names and the arguments of its data set.

Written anew from the paper and the data set. Two checks of it are looser here: `english_capital` and
`english_lowercase` look at letters alone, so that they need no detector of languages.

Source: Zhou et al. 2023, Instruction-Following Evaluation for Large Language Models (arXiv 2311.07911), table 1.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import regex

from mara_integrations.errors import RewardError
from mara_integrations.rewards.language import language_probability
from mara_integrations.rewards.reading import sentences
from mara_integrations.rewards.words import ForbiddenWords

Check = Callable[..., bool]
_ANSWERS = ("my answer is yes.", "my answer is no.", "my answer is maybe.")


def _compare(count: int, relation: str, wanted: Any) -> bool:
    match relation:
        case "less than":
            return count < int(wanted)
        case "at least":
            return count >= int(wanted)
    raise RewardError(f"relation {relation!r} is not allowed", hint="less than or at least")


def _several(words: Any) -> list[str]:
    return words.split(",") if isinstance(words, str) else list(words)


def _num_words(text: str) -> int:
    return len(regex.findall(r"\w+", text))


def _existence(text: str, keywords: Any) -> bool:
    return all(word.strip().casefold() in text.casefold() for word in _several(keywords))


def _frequency(text: str, keyword: str, frequency: Any, relation: str = "at least") -> bool:
    return _compare(text.casefold().count(keyword.strip().casefold()), relation, frequency)


def _forbidden(text: str, forbidden_words: Any) -> bool:
    return not ForbiddenWords(_several(forbidden_words)).violations(text)


def _letter_frequency(text: str, letter: str, let_frequency: Any, let_relation: str = "at least") -> bool:
    return _compare(text.casefold().count(letter.casefold()), let_relation, let_frequency)


def _language(text: str, language: str) -> bool:
    return language_probability(text, language) > 0.5


def _num_sentences(text: str, num_sentences: Any, relation: str = "at least") -> bool:
    return _compare(len(sentences(text)), relation, num_sentences)


def _words(text: str, num_words: Any, relation: str = "at least") -> bool:
    return _compare(_num_words(text), relation, num_words)


def _paragraphs(text: str, num_paragraphs: Any) -> bool:
    parts = [part.strip() for part in regex.split(r"\s?\*\*\*\s?", text)]
    inner = parts[1:-1] if len(parts) > 1 else []
    return all(inner) and sum(map(bool, parts)) == int(num_paragraphs)


def _first_word(text: str, num_paragraphs: Any, nth_paragraph: Any, first_word: str) -> bool:
    parts = [part.strip() for part in regex.split(r"\n\s*\n", text) if part.strip()]
    if len(parts) != int(num_paragraphs) or not 1 <= int(nth_paragraph) <= len(parts):
        return False
    found = regex.match(r"\W*([\p{L}\p{N}\p{M}'’\-]*)", parts[int(nth_paragraph) - 1])
    return found is not None and found[1].casefold() == first_word.strip().casefold()


def _placeholders(text: str, num_placeholders: Any) -> bool:
    return len(regex.findall(r"\[[^\[\]]*+\]", text)) >= int(num_placeholders)


def _postscript(text: str, postscript_marker: str) -> bool:
    letters = [regex.escape(c) for c in postscript_marker.casefold() if c.isalnum()]
    marker = r"\.?\s?".join(letters) if postscript_marker.upper().startswith("P.") else None
    return regex.search(rf"(?:^|\s){marker or regex.escape(postscript_marker.casefold())}", text.casefold()) is not None


def _bullets(text: str, num_bullets: Any) -> bool:
    return len(regex.findall(r"(?m)^[^\S\n]*(?:\*(?!\*)|-(?!-))[^\n]*\S", text)) == int(num_bullets)


def _constrained(text: str) -> bool:
    return any(answer in text.casefold() for answer in _ANSWERS)


def _highlights(text: str, num_highlights: Any) -> bool:
    found = regex.findall(r"\*\*[^\n*]+\*\*|\*[^\n*]+\*", text)
    return sum(bool(part.strip("* ")) for part in found) >= int(num_highlights)


def _sections(text: str, section_spliter: str, num_sections: Any) -> bool:
    return len(regex.findall(rf"\b{regex.escape(section_spliter.strip())}\s?\d+", text)) >= int(num_sections)


def _json(text: str) -> bool:
    plain = regex.sub(r"\A\s*```(?:json)?\s*|\s*```\s*\Z", "", text, flags=regex.IGNORECASE)
    try:
        json.loads(plain)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return any(part.strip("<> ") for part in regex.findall(r"<<[^\n>]+>>", text))


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    valid = [part for part in parts if part]
    return all(parts[1:-1]) and len(valid) == 2 and valid[0] != valid[1]


def _repeat(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().casefold().startswith(prompt_to_repeat.strip().casefold())


def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').casefold().endswith(end_phrase.strip().casefold())


def _capital_words(text: str, capital_frequency: Any, capital_relation: str = "at least") -> bool:
    count = sum(word.isupper() for word in regex.findall(r"[\p{L}\p{N}\p{M}'’\-]+", text))
    return _compare(count, capital_relation, capital_frequency)


def _capital(text: str) -> bool:
    return text.isupper()


def _lowercase(text: str) -> bool:
    return text.islower()


def _no_comma(text: str) -> bool:
    return not any(comma in text for comma in ",،，、")


def _quotation(text: str) -> bool:
    plain = text.strip()
    return len(plain) > 1 and (plain[0], plain[-1]) in (('"', '"'), ("“", "”"), ("„", "“"), ("«", "»"))


INSTRUCTIONS: dict[str, Check] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _language,
    "length_constraints:number_sentences": _num_sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _capital,
    "change_case:english_lowercase": _lowercase,
    "punctuation:no_comma": _no_comma,
}


def follows(text: str, instruction: str, arguments: Mapping[str, Any] | None = None) -> bool:
    """Return whether a reply follows an instruction.

    Args:
        text: The reply.
        instruction: Name in IFEval, such as `punctuation:no_comma`.
        arguments: Its arguments by their names in IFEval; those that are None count as not given.

    Raises:
        RewardError: If there is no such instruction, or it takes other arguments.
        ConfigError: If it names a language that the detector does not know.
        MissingExtraError: If it needs py3langid, and that is not installed.
    """
    given = {name: value for name, value in (arguments or {}).items() if value is not None}
    check_arguments(instruction, given)
    try:
        return bool(text.strip()) and INSTRUCTIONS[instruction](text, **given)
    except (TypeError, ValueError) as error:
        if isinstance(error, RewardError):
            raise
        raise RewardError(f"instruction {instruction!r} has arguments of another kind: {given!r}") from None


def check_arguments(instruction: str, arguments: Mapping[str, Any]) -> None:
    """Refuse what `follows` can't check.

    Raises:
        RewardError: If there is no such instruction, or it takes other arguments.
    """
    if instruction not in INSTRUCTIONS:
        raise RewardError(f"instruction {instruction!r} is unknown", hint=f"there are {', '.join(INSTRUCTIONS)}")
    parameters = list(inspect.signature(INSTRUCTIONS[instruction]).parameters.values())[1:]
    needed = {p.name for p in parameters if p.default is p.empty}
    if needed - arguments.keys() or arguments.keys() - {p.name for p in parameters}:
        raise RewardError(
            f"instruction {instruction!r} takes {', '.join(p.name for p in parameters) or 'nothing'}; given is "
            f"{', '.join(arguments) or 'nothing'}"
        )


def share_followed(text: str, instructions: Sequence[str], arguments: Any) -> float | None:
    """Return the share of a row's instructions that a reply follows; None for a row without any.

    Args:
        text: The reply.
        instructions: Column `instruction_id_list` of IFEval.
        arguments: Column `kwargs`: one mapping an instruction, or all of them as JSON.

    Raises:
        RewardError: See `follows`; or if there is not one mapping an instruction.
    """
    if not instructions:
        return None
    mappings = json.loads(arguments) if isinstance(arguments, str) else arguments
    given = [{}] * len(instructions) if mappings is None else list(mappings)
    if len(given) != len(instructions):
        raise RewardError(f"{len(instructions)} instructions have {len(given)} kwargs", hint="one mapping each")
    parsed = [cast("Mapping[str, Any]", json.loads(each) if isinstance(each, str) else each) for each in given]
    found = [follows(text, name, each) for name, each in zip(instructions, parsed, strict=True)]
    return sum(found) / len(found)
