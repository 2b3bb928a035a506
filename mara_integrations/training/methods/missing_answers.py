"""What a head is to say where documents hold no answer: a sentence, given as a reply to teach it token by token.

A gate chooses among the base model's candidates, so a sentence can be said only where each of its tokens is one of
them. Documents that are taken for the wrong ones teach to say it; the same words after the right ones teach not to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.markup import escape

from mara_integrations.errors import ConfigError
from mara_integrations.messages import Conversation
from mara_integrations.training.collect.given import read_states
from mara_integrations.training.context import Run
from mara_integrations.training.methods.q_wanted import Wanted
from mara_integrations.training.rollouts.positions import GivenPositions, positions_of_given
from mara_integrations.training.rollouts.replies import GivenReply, Reply

# What is said where the settings name nothing: the first one that the model can say.
SENTENCES = (
    "There is no information about this in the context.",
    "There is no information about this in the documents.",
    "There is no information about this in the text.",
    "There is no information about this.",
    "I do not know.",
)
_ENOUGH, _LEAST = 0.9, 0.5  # of the prompts after which a sentence can be said
_NUM_TRIED = 24  # prompts


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt with documents.

    Attributes:
        prompt: The prompt.
        is_answerable: Whether its documents hold the answer.
        has_replies: Whether there are replies of the base model that tell what is wanted, where they do.
    """

    prompt: Conversation
    is_answerable: bool
    has_replies: bool


def choose_sentence(run: Run, prompts: Sequence[Conversation]) -> str:
    """Return the sentence of the settings, or the first of `SENTENCES` that the model can say after most prompts.

    Args:
        run: The run.
        prompts: Prompts whose documents hold no answer, at least one.

    Raises:
        ConfigError: If the sentence of the settings is longer than a reply, or can't be said after most prompts.
    """
    tried = prompts[:: max(1, len(prompts) // _NUM_TRIED)]
    given, shares = run.config.missing_answer, dict[str, float]()
    if given:
        _check_length(run, given)
    for number, sentence in enumerate([given] if given else SENTENCES, start=1):
        replies, found = _read(run, f"sentence {number} on trial", sentence, tried)
        cut = {int(reply) for reply, _ in found.outside}
        shares[sentence] = 1.0 - len(cut) / len(replies)
        run.log("sentence on trial", sentence=sentence, share=shares[sentence])
        if shares[sentence] >= _ENOUGH:
            break
        if given and shares[given] < _LEAST:
            raise _beyond_reach(run, given, replies, found)
    best = max(shares, key=shares.__getitem__)
    share = f", which the model can say after {shares[best]:.0%} of these prompts" if shares[best] < 1.0 else ""
    run.say(f'  where documents hold no answer, the head is to say "{escape(best)}"{share}')
    if shares[best] < _LEAST:
        run.say(
            "  [yellow]it will hardly say so: give a sentence that is likelier after your prompt (missing_answer)[/]"
        )
    return best


def given_to(run: Run, sentence: str, prompts: Sequence[Conversation]) -> list[GivenReply]:
    """Return the sentence, and the token that ends a reply, as a given reply to each prompt."""
    text = _with_end(run, sentence)
    return [GivenReply(index, prompt, text) for index, prompt in enumerate(prompts)]


def read_sentence(run: Run, stage: str, sentence: str, asked: Sequence[Asked]) -> Wanted:
    """Return what is wanted along the sentence after each prompt.

    It is the sentence itself where documents hold no answer, and the base model's own choice elsewhere; but not of the
    first token where replies tell what is wanted.
    """
    where = _read(run, stage, sentence, [each.prompt for each in asked])[1].positions
    is_answerable = torch.tensor([each.is_answerable for each in asked])[where.replies]
    has_replies = torch.tensor([each.has_replies for each in asked])[where.replies]
    own = torch.full_like(where.log_probs, -torch.inf).scatter(1, where.taken[:, None], 0.0)
    wanted = Wanted(where, torch.where(is_answerable[:, None], where.log_probs, own))
    return wanted.take((~(is_answerable & has_replies) | (where.places > 0)).nonzero()[:, 0])


def _read(
    run: Run, stage: str, sentence: str, prompts: Sequence[Conversation]
) -> tuple[Sequence[Reply], GivenPositions]:
    replies = read_states(run, stage, given_to(run, sentence, prompts))
    return replies, positions_of_given(replies, run.backend.logits, run.sampling())


def _with_end(run: Run, sentence: str) -> str:
    tokenizer = run.model.tokenizer
    return f"{sentence}{tokenizer.eos_token}" if tokenizer.eos_token_id in run.model.eos_token_ids else sentence


def _check_length(run: Run, sentence: str) -> None:
    """Refuse a sentence that is longer than the replies to learn from."""
    num_tokens = len(run.model.tokenizer(_with_end(run, sentence), add_special_tokens=False).input_ids)
    if num_tokens > run.config.max_reply_tokens:
        raise ConfigError(
            f"missing_answer={sentence!r} has {num_tokens} tokens, but max_reply_tokens={run.config.max_reply_tokens}",
            hint="give a shorter sentence, or a larger max_reply_tokens",
        )


def _beyond_reach(run: Run, sentence: str, replies: Sequence[Reply], found: GivenPositions) -> ConfigError:
    """Return an error that names the token that is most often no candidate."""
    places = found.outside[:, 1].bincount()
    place, count = int(places.argmax()), int(places.max())
    tokens = replies[0].token_ids
    before, token = (run.model.tokenizer.decode(list(part)) for part in (tokens[:place], tokens[place : place + 1]))
    return ConfigError(
        f"missing_answer={sentence!r} can't be said: after {before!r}, {token!r} is not among the "
        f"{run.config.top_k} most probable tokens, or beyond top_p={run.config.top_p:g}, after {count} of "
        f"{len(replies)} prompts",
        hint="use words of your prompt, as context, or give a larger top_k and top_p",
    )
