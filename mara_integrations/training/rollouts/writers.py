"""Who writes replies to learn from: this process, or others (`ray_writers`) that are handed the same parts of the work.

A part is a batch of the decoder with all that decides it, so that it holds the same replies wherever it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from typing_extensions import override

from mara_integrations.engine.backends.protocol import Backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Conversation
from mara_integrations.models.load import LoadedModel
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.training.rollouts.decisions import taken_rank
from mara_integrations.training.rollouts.replies import OnReply, Reply, sample_replies

Promise: TypeAlias = Callable[[], list[Reply]]  # waits for a part's replies; to be called once


@dataclass(frozen=True, slots=True)
class Part:
    """Replies to write in one batch; see `bank.sample_replies`, whose positions are kept where there is a head."""

    prompts: Sequence[Conversation]
    sampling: SamplingParams
    seed: int
    replies_each: int = 1
    head: MARAHead | None = None
    gate: GateParams | None = None

    def write(self, model: LoadedModel, backend: Backend, on_reply: OnReply | None = None) -> list[Reply]:
        """Write it here, with a decoder that has seen nothing yet: what one adapts to must not depend on the past."""
        replies = sample_replies(
            model,
            Decoder(backend),
            self.prompts,
            sampling=self.sampling,
            replies_each=self.replies_each,
            seed=self.seed,
            head=self.head,
            gate=self.gate,
            keep_positions=self.head is not None,
            on_reply=on_reply,
        )
        if self.head is not None and self.head.config.form != "paper":  # drawn: what was fed ahead in vain is dropped
            for reply in replies:
                for position in reply.positions:
                    position.states = position.states[: taken_rank(reply, position) + 1]
        return replies


class Writers(Protocol):
    """Takes parts and gives their replies."""

    @property
    def width(self) -> int:
        """Parts that can be under way at once."""

    def submit(self, part: Part, on_reply: OnReply) -> Promise:
        """Begin a part, with its head as it is now."""

    def close(self) -> None:
        """Let go of everything."""


class WritersHere(Writers):
    """This process, one part at a time, at once."""

    def __init__(self, model: LoadedModel, backend: Backend) -> None:
        self._model, self._backend = model, backend

    @property
    @override
    def width(self) -> int:
        return 1

    @override
    def submit(self, part: Part, on_reply: OnReply) -> Promise:
        replies = part.write(self._model, self._backend, on_reply)
        return lambda: replies

    @override
    def close(self) -> None:
        pass


class Ahead:
    """Parts of one list, begun before their turn where writers are free.

    Args:
        writers: Write them.
        parts: The list.
        on_reply: Called with counts of finished replies.
    """

    def __init__(self, writers: Writers, parts: Sequence[Part], on_reply: OnReply) -> None:
        self._writers, self._parts, self._on_reply = writers, parts, on_reply
        self._promises: dict[int, Promise] = {}

    def begin(self, numbers: Iterable[int]) -> None:
        """Begin those of the named parts that are not under way."""
        for number in numbers:
            if number not in self._promises:
                self._promises[number] = self._writers.submit(self._parts[number], self._on_reply)

    def collect(self, number: int) -> list[Reply]:
        """A part's replies, begun or not."""
        self.begin([number])
        return self._promises.pop(number)()
