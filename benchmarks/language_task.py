"""The task of answering in the language of the question: English, French, German or Italian.

Small models often answer in English what was asked in another language. Trained by the reward `language`, which
detects both languages; judged by the language that the question was written in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from context_tasks import text

from mara_integrations.rewards.language import language_probability

_QUESTIONS = {
    "en": [
        "What can I see in {} in one day?", "How do I get to {} by train?", "Why is {} famous?",
        "What do people eat in {}?", "When should I go to {}?", "Is {} expensive for a student?",
        "Tell me the story of {} in a few words.", "How do I find a flat in {}?",
    ],
    "fr": [
        "Que puis-je voir à {} en une journée ?", "Comment aller à {} en train ?", "Pourquoi {} est-elle célèbre ?",
        "Que mange-t-on à {} ?", "Quand faut-il aller à {} ?", "La vie à {} est-elle chère pour un étudiant ?",
        "Raconte-moi brièvement l'histoire de {}.", "Comment trouver un appartement à {} ?",
    ],
    "de": [
        "Was kann ich an einem Tag in {} sehen?", "Wie komme ich mit dem Zug nach {}?", "Warum ist {} berühmt?",
        "Was isst man in {}?", "Wann sollte ich nach {} reisen?", "Ist {} für Studenten teuer?",
        "Erzähle mir kurz die Geschichte von {}.", "Wie finde ich eine Wohnung in {}?",
    ],
    "it": [
        "Che cosa posso vedere a {} in un giorno?", "Come arrivo a {} in treno?", "Perché {} è famosa?",
        "Che cosa si mangia a {}?", "Quando dovrei andare a {}?", "{} è cara per uno studente?",
        "Raccontami in breve la storia di {}.", "Come trovo un appartamento a {}?",
    ],
}  # fmt: skip
# Their names are the same in all four languages.
_TEST_PLACES = ("Oslo", "Toronto")
_TRAINING_PLACES = (
    "Boston", "Chicago", "Dallas", "Denver", "Lima", "Miami", "Nairobi", "Kyoto", "Osaka", "Sydney", "Caracas",
    "Santiago", "Las Vegas", "Orlando", "Los Angeles", "Buenos Aires", "Houston", "Detroit", "Phoenix", "Vancouver",
)  # fmt: skip


def _asked(places: Sequence[str]) -> dict[str, str]:
    """Each question about each place, with its language."""
    return {
        question.format(place): language
        for place in places
        for language, questions in _QUESTIONS.items()
        for question in questions
    }


TRAINING_PROMPTS = list(_asked(_TRAINING_PLACES))
TEST_PROMPTS = _asked(_TEST_PLACES)


def in_the_language(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """Return 1 for each reply that is in the language of its test prompt, else 0."""
    asked = zip(map(text, prompts), map(text, completions), strict=True)
    return [float(language_probability(reply, TEST_PROMPTS[prompt]) > 0.5) for prompt, reply in asked]
