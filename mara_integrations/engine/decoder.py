"""Gated decoding of many sequences: propose, forward, judge, commit. The method of the paper is `Decoder.step`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from itertools import islice

import torch
from torch import Tensor

from mara_integrations.engine.backend import Backend, Segment
from mara_integrations.engine.candidates import rank_candidates
from mara_integrations.engine.cost import CostCurve, measure
from mara_integrations.engine.heads import HeadStacks, Shown
from mara_integrations.engine.prefix import PrefixCache
from mara_integrations.engine.scheduler import ACCELERATOR_KNEE, CPU_KNEE, Scheduler
from mara_integrations.engine.sequence import FedAhead, Look, Request, Sequence


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
        siblings' states; the one the gate takes is kept, and its forward has already computed what comes after it.
        """
        self.scheduler.admit(self._start, self.prefixes)
        plan = self.scheduler.plan()
        if plan:
            fed = [sequence for sequence, _ in plan]
            segments = [self._propose(sequence, chunk) for sequence, chunk in plan]  # propose
            hidden = self.backend.feed(segments)  # forward: (T, d)
            self._judge(fed, segments, hidden)  # judge, commit
            self._look_ahead([s for s in fed if s.position is None and not s.pending])
        return self._retire()

    def _start(self, request: Request) -> Sequence:
        kept, length = self.prefixes.longest(request.prompt_ids)
        return Sequence(request, self.backend.open(kept, length), num_known=length)

    def _propose(self, sequence: Sequence, chunk: int) -> Segment:
        num_drafted = self.scheduler.num_drafted(sequence) if self.backend.can_retract else 0
        return sequence.propose(self.scheduler.width(sequence), chunk, num_drafted)

    def _judge(self, live: list[Sequence], segments: list[Segment], hidden: Tensor) -> None:
        """Settle what was pending, show the new candidates to their heads, and keep the branches taken."""
        asked, shown = [], []
        for sequence, states in zip(live, hidden.split([len(s.token_ids) for s in segments]), strict=True):
            num_proposed = len(states) - len(sequence.draft)
            before = sequence.tip
            if sequence.position is None:
                _settle_chain(sequence, num_proposed, states[num_proposed - 1])
                if not sequence.pending and not sequence.token_ids:  # the prompt has just been read
                    self._keep_prefix(sequence, sequence.request.prompt_ids)
                before, states = sequence.tip, states[num_proposed:]
            if sequence.token_ids or sequence.position:
                sequence.stats.fed += len(states)
            if sequence.draft and not sequence.gated:
                sequence.ahead = [FedAhead(t, None, state) for t, state in zip(sequence.draft, states, strict=True)]
            elif len(states):
                assert sequence.request.head is not None and before is not None, "its prompt was fed before"
                previous = torch.cat([before[None], states[:-1]]) if sequence.draft else before
                asked.append(sequence)
                shown.append(Shown(sequence.request.head, states, previous))
        rows, branches = [], []
        for sequence, (_, states, _), scores in zip(asked, shown, self._heads.score(shown), strict=True):
            num_proposed = len(states) - len(sequence.draft)
            if sequence.position is not None:
                num_rejected, num_fallbacks = sequence.stats.rejected, sequence.stats.fallbacks
                taken = sequence.judge(scores[:num_proposed], states[:num_proposed])
                if taken is None:
                    if sequence.draft:
                        self.backend.retract(sequence.row, len(states), held=True)
                    continue
                num_rejected = sequence.stats.rejected - num_rejected
                self.scheduler.observe(num_rejected, accepted=sequence.stats.fallbacks == num_fallbacks)
                sequence.keep_state()
                if not sequence.draft:
                    rows.append(sequence.row)
                    branches.append(taken)
            behind = zip(sequence.draft, scores[num_proposed:], states[num_proposed:], strict=True)
            sequence.ahead = [FedAhead(*fed) for fed in behind]
        if rows:
            self.backend.commit(rows, branches)

    def _look_ahead(self, settled: list[Sequence]) -> None:
        """Rank the candidates of the next position of sequences whose last token is committed, and verify drafts."""
        settled = [sequence for sequence in settled if sequence.finish_reason is None]
        if not settled:
            return
        tips = [[sequence.tip, *(fed.state for fed in sequence.ahead)] for sequence in settled]
        hidden = torch.stack([state for states in tips for state in states])  # type: ignore[misc]  # a tip is known now
        logits = self.backend.logits(hidden).float()  # (B, V)
        owners = [sequence for sequence, states in zip(settled, tips, strict=True) for _ in states]
        for row, sequence in zip(logits, owners, strict=True):
            if sequence.request.constraint is not None:
                sequence.request.constraint.mask(row)
        sampling = [sequence.request.sampling for sequence in owners]
        candidates = rank_candidates(
            logits,
            top_k=[s.top_k for s in sampling],
            top_p=[s.top_p for s in sampling],
            temperature=[sequence.temperature or 1.0 for sequence in owners],
            min_candidates=[s.min_candidates for s in sampling],
        )
        columns = (candidates.token_ids, candidates.log_probs, candidates.hazard_logits)
        ids, log_probs, hazard_logits = (column.tolist() for column in columns)
        counts = candidates.counts.tolist()
        looks = iter(
            [Look(*(c[:n] for c in row)) for n, *row in zip(counts, ids, log_probs, hazard_logits, strict=True)]
        )
        for sequence, states in zip(settled, tips, strict=True):
            num_wasted, held = sequence.follow(list(islice(looks, len(states))))
            if num_wasted:
                self.backend.retract(sequence.row, num_wasted, held=held)

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


def _settle_chain(sequence: Sequence, count: int, state: Tensor) -> None:
    """Tokens of a chain are committed by feeding them; `state` is that of the last of them."""
    del sequence.pending[:count]
    sequence.tip = state
    if sequence.token_ids:
        sequence.stats.fed += count
    if not sequence.pending:
        sequence.keep_state()
