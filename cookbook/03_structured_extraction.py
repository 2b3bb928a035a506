"""Text to objects: reviews become instances of a pydantic class, checked, every time.

`with_structured_output` turns the class into a grammar. The model cannot write a reply that is no `Review`: what the
class forbids is not among the candidates. The head, if there is one, judges those that are left. Whether the *content* is
right is a matter of the model: closed sets (`Literal`) and bounds (`ge`, `le`, `max_length`) help small models most, and a
description says what a field is for. A string has 1,000 characters at most unless `max_length` says otherwise.

    python cookbook/03_structured_extraction.py [head]
"""

from __future__ import annotations

import sys
from typing import Literal

from langchain_core.prompts import ChatPromptTemplate
from pydantic import BaseModel, Field

from mara_integrations import ChatMARA

REVIEWS = (
    "The lamp is beautiful and bright. I love it! Five stars.",
    "The chair broke after two days. Terrible, one star.",
)


class Review(BaseModel):
    """What a customer says about an article."""

    article: Literal["chair", "lamp", "table"]
    mood: Literal["happy", "unhappy"] = Field(description="How the customer feels")
    stars: int = Field(ge=1, le=5)


def main(head: str | None = None) -> list[Review]:
    """Extract both reviews.

    Args:
        head: A trained head.
    """
    prompt = ChatPromptTemplate.from_messages(
        [
            ("system", "Extract article, mood (happy or unhappy) and stars (1 to 5) from the review, as JSON."),
            ("human", "Table wobbles. Not good, two stars."),  # an example says more to a small model than a schema
            ("ai", '{{"article": "table", "mood": "unhappy", "stars": 2}}'),
            ("human", "{review}"),
        ]
    )
    chain = prompt | ChatMARA("smollm2", head=head, max_tokens=60).with_structured_output(Review)
    # `stream` gives the object while it is written; `batch` decodes all of them together
    reviews = chain.batch([{"review": text} for text in REVIEWS])
    for text, review in zip(REVIEWS, reviews, strict=True):
        print(f"{text}\n  -> {review!r}")
    return reviews


if __name__ == "__main__":
    main(*sys.argv[1:])
