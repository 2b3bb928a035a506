"""Text to objects: reviews become instances of a pydantic class, checked, every time.

`with_structured_output` turns the class into a grammar. The model cannot write a reply that is no `Review`: what the
class forbids is not among the candidates. The head, if there is one, judges those that are left. Whether the *content*
is right is a matter of the model: closed sets (`Literal`), bounds (`ge`, `le`, `max_length`) and examples help small
models most. A string has 1,000 characters at most unless `max_length` says otherwise.

`max_tokens` is the length of the whole object: where it gets tight, the grammar takes the shortest way to the end, and
that is not the model's choice any more. Leave it some 60 tokens more than you expect.

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
            # two examples say more to a small model than a schema; with one, it copies that
            ("human", "Table wobbles. Not good, two stars."),
            ("ai", '{{"article": "table", "mood": "unhappy", "stars": 2}}'),
            ("human", "I sit well on this chair, four stars."),
            ("ai", '{{"article": "chair", "mood": "happy", "stars": 4}}'),
            ("human", "{review}"),
        ]
    )
    chain = prompt | ChatMARA("smollm2", head=head, max_tokens=120).with_structured_output(Review)
    # `stream` gives the object while it is written; `batch` decodes all of them together
    reviews = chain.batch([{"review": text} for text in REVIEWS])
    for text, review in zip(REVIEWS, reviews, strict=True):
        print(f"{text}\n  -> {review!r}")
    return reviews


if __name__ == "__main__":
    main(*sys.argv[1:])
