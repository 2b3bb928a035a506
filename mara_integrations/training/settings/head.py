"""Settings of the head, and of how it is fitted."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mara_integrations.sampling import HeadForm, Params


class HeadSettings(Params):
    """The head's form and size, and how it is fitted."""

    kl_budget: Annotated[
        float | None,
        Field(
            gt=0.0,
            description="Bound on how far the head may move the model from the base model: their KL divergence, in "
            "nats a token. Default: 0.3 for principle and teacher, 0.15 for grounding and for heads of other forms "
            "than q, none for rule, else 0.2. Unless you name one, heads of the form q also keep replies from losing "
            "much perplexity or variety, but for rule.",
        ),
    ] = None
    form: Annotated[
        HeadForm | None,
        Field(
            description="Form of the head: q scores candidates before they are fed, the others after it. Default: the "
            "method's own."
        ),
    ] = None
    inner_size: Annotated[
        int | None,
        Field(
            ge=8,
            description="Width of the head's first hidden layer; the second is a quarter of it. Default: 1024, or 256 "
            "for heads of the q form.",
        ),
    ] = None
    epochs: Annotated[int, Field(ge=1, description="Largest number of epochs of a fit.")] = 20
    patience: Annotated[
        int, Field(ge=1, description="Epochs without a lower held-out loss before a fit stops early.")
    ] = 4
    learning_rate: Annotated[
        float | None, Field(gt=0.0, description="Learning rate of AdamW. Default: the method's own.")
    ] = None
    weight_decay: Annotated[float, Field(ge=0.0, description="Weight decay of AdamW.")] = 0.01
    batch_size: Annotated[int, Field(ge=1, description="Tokens a step of a fit.")] = 512
