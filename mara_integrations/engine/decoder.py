"""Gated decoding of many sequences: propose, forward, judge, commit. The method of the paper is `Decoder.step`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from functools import partial
from itertools import chain, islice

import torch
from torch import Tensor

from mara_integrations.engine.backends.prefix_cache import PrefixCache
from mara_integrations.engine.backends.protocol import Backend, Segment
from mara_integrations.engine.candidates import Ranking, rank_candidates
from mara_integrations.engine.head_stacks import HeadStacks
from mara_integrations.engine.request import Request
from mara_integrations.engine.scheduler import ACCELERATOR_KNEE, CPU_KNEE, Scheduler
from mara_integrations.engine.sequence import Sequence
from mara_integrations.engine.speculation.cost import CostCurve, measure


class Decoder:
    """Runs requests on one backend, each with a head and settings of its own. Not thread-safe: see `worker.Worker`."""

    def __init__(self, backend: Backend, scheduler: Scheduler | None = None) -> None:
        self.backend = backend
        self.scheduler = scheduler or Scheduler(knee=_knee(backend))
        self.prefixes = PrefixCache()
        self._heads = HeadStacks()

    @classmethod
    def measured(cls, backend: Backend) -> Decoder:
        """One whose widths follow what forwards cost here and now; takes about a second to make.

        Not for training: with other widths last digits differ, and an interrupted run would not go on bit for bit.
        """
        return cls(backend, Scheduler(cost=measure(backend, CostCurve.flat_to(_knee(backend)))))

    def submit(self, request: Request) -> None:
        """Queue a request."""
        assert len(request.prompt_ids) > 0, "a prompt has at least one token"
        self.scheduler.waiting.append(request)

    @property
    def is_idle(self) -> bool:
        """Nothing is live or waiting."""
        return not self.scheduler.waiting and not self.scheduler.live

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """One forward for the live sequences that are due; returns those that are done.

        Each feeds the tokens it has settled, or the next candidates of its position as siblings. The head looks at the
        siblings' states; the one the gate takes is kept, and its forward has already computed what comes after it:
        logits are made of accepted states only.
        """
        self.scheduler.admit(self._start, self.prefixes)
        plan = self.scheduler.plan()
        if plan:
            sequences = [sequence for sequence, _ in plan]
            segments = [self._propose(sequence, chunk) for sequence, chunk in plan]  # propose
            hidden = self.backend.feed(segments)  # forward: (T, d)
            self._judge(sequences, hidden.split([len(segment.token_ids) for segment in segments]))  # judge, commit
            self._open_positions([sequence for sequence in sequences if sequence.is_settled])  # the next candidates
            self._take_back([sequence for sequence in sequences if sequence.num_wasted])
        return self._retire()

    def _start(self, request: Request) -> Sequence:
        kept, length = self.prefixes.longest(request.prompt_ids)
        return Sequence(request, self.backend.open(kept, length), num_known=length)

    def _propose(self, sequence: Sequence, chunk: int) -> Segment:
        num_drafted = partial(self.scheduler.num_drafted, sequence) if self.backend.can_retract else None
        return sequence.propose(self.scheduler.width(sequence), chunk, num_drafted)

    def _judge(self, sequences: list[Sequence], states: Seq[Tensor]) -> None:
        """Show the states to the heads, let the gates decide, and keep the branches taken."""
        shown = [sequence.receive(mine) for sequence, mine in zip(sequences, states, strict=True)]
        scores = iter(self._heads.score([one for one in shown if one is not None]))
        rows, branches = [], []
        for sequence, asked in zip(sequences, shown, strict=True):
            verdict = sequence.hear(next(scores)) if asked is not None else sequence.hear()
            if verdict is None:
                continue
            self.scheduler.observe(verdict)
            if not sequence.has_drafted:  # a chain is committed by being fed
                rows.append(sequence.row)
                branches.append(verdict.taken)
        if rows:
            self.backend.commit(rows, branches)

    def _open_positions(self, settled: list[Sequence]) -> None:
        """Rank the candidates of the next position of each, and of those behind it that were fed ahead."""
        for sequence in settled:
            if not sequence.token_ids:  # its prompt has just been read
                self._keep_prefix(sequence, sequence.request.prompt_ids)
        if not settled:
            return
        tips = [sequence.tips() for sequence in settled]
        logits = self.backend.logits(torch.stack(list(chain(*tips)))).float()  # (B, V)
        rows = logits.split([len(mine) for mine in tips])
        for sequence, mine in zip(settled, rows, strict=True):
            if sequence.request.constraint is not None:
                sequence.request.constraint.mask(mine[0])
        owners = [sequence for sequence, mine in zip(settled, tips, strict=True) for _ in mine]
        rankings = iter(_rank(owners, logits))
        for sequence, mine in zip(settled, rows, strict=True):
            sequence.follow(partial(_ranking, sequence, mine, list(islice(rankings, len(mine)))))

    def _take_back(self, sequences: list[Sequence]) -> None:
        """Forget what was drafted in vain."""
        for sequence in sequences:
            self.backend.retract(sequence.row, sequence.num_wasted, held=sequence.holds_branch)
            sequence.num_wasted = 0

    def _retire(self) -> list[Sequence]:
        done = self.scheduler.retire()
        for sequence in done:
            if sequence.finish_reason is not None:  # the next turn may begin with all of it that was fed
                num_fed = len(sequence.token_ids) - max(1, len(sequence.pending))
                self._keep_prefix(sequence, [*sequence.request.prompt_ids, *sequence.token_ids[:num_fed]])
            self.backend.close(sequence.row)
        return done

    def _keep_prefix(self, sequence: Sequence, token_ids: Seq[int]) -> None:
        self.prefixes.add(token_ids, lambda: self.backend.keep(sequence.row, len(token_ids)))

    def abort(self) -> list[Sequence]:
        """Drop everything that is live or waiting, as after an error in the model; returns the live ones."""
        dropped, self.scheduler.live = self.scheduler.live, []
        self.scheduler.waiting.clear()
        for sequence in dropped:
            self.backend.close(sequence.row)
        return dropped

    def run(self, requests: Iterable[Request], on_done: Callable[[Sequence], None] | None = None) -> list[Sequence]:
        """Decode all requests to their ends, in batches; returns their sequences in order."""
        requests = list(requests)
        finished: dict[int, Sequence] = {}
        for request in requests:
            self.submit(request)
        try:
            while not self.is_idle:
                for sequence in self.step():
                    finished[id(sequence.request)] = sequence
                    if on_done is not None:
                        on_done(sequence)
        except BaseException:
            self.abort()
            raise
        return [finished[id(request)] for request in requests]


def _knee(backend: Backend) -> int:
    return CPU_KNEE if backend.device.type == "cpu" else ACCELERATOR_KNEE


def _ranking(sequence: Sequence, logits: Tensor, rankings: list[Ranking], place: int) -> Ranking:
    """Candidates after one of a sequence's tips, all tokens before them taken; logits are (len(tips), V)."""
    constraint = sequence.request.constraint
    if constraint is None or place == 0:
        return rankings[place]
    constraint.mask(logits[place])  # what may stand here depends on the tokens before: it was not known until now
    return _rank([sequence], logits[place, None])[0]


def _rank(sequences: Seq[Sequence], logits: Tensor) -> list[Ranking]:
    """Candidates of a position of each, (B, V) logits, by the settings of its request."""
    sampling = [sequence.request.sampling for sequence in sequences]
    return rank_candidates(
        logits,
        top_k=[s.top_k for s in sampling],
        top_p=[s.top_p for s in sampling],
        temperature=[sequence.temperature or 1.0 for sequence in sequences],
        min_candidates=[s.min_candidates for s in sampling],
    ).rankings()
