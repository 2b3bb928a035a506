"""Gated decoding of many sequences: propose, forward, judge, commit. The method of the paper is `Decoder.step`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from mara_integrations.engine.backend import Backend, Segment
from mara_integrations.engine.candidates import rank_candidates
from mara_integrations.engine.heads import HeadStacks, Shown
from mara_integrations.engine.prefix import PrefixCache
from mara_integrations.engine.scheduler import ACCELERATOR_KNEE, CPU_KNEE, Scheduler
from mara_integrations.engine.sequence import Request, Sequence


class Decoder:
    """Runs requests on one backend, each with a head and settings of its own. Not thread-safe: see `worker.Worker`."""

    def __init__(self, backend: Backend, scheduler: Scheduler | None = None) -> None:
        self.backend = backend
        knee = CPU_KNEE if backend.device.type == "cpu" else ACCELERATOR_KNEE
        self.scheduler = scheduler or Scheduler(knee=knee)
        self.prefixes = PrefixCache()
        self._heads = HeadStacks()

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
        """One forward for every live sequence; returns those that are done.

        Each feeds the tokens it has settled, or the next candidates of its position as siblings. The head looks at the
        siblings' states; the one the gate takes is kept, and its forward has already computed what comes after it.
        """
        self.scheduler.admit(self._start, self.prefixes)
        live = self.scheduler.live
        if live:
            segments = [s.propose(self.scheduler.width(s), self.scheduler.prefill_chunk) for s in live]  # propose
            hidden = self.backend.feed(segments)  # forward: (T, d)
            self._judge(live, segments, hidden)  # judge, commit
            self._look_ahead([s for s in live if s.position is None and not s.pending])
        return self._retire()

    def _start(self, request: Request) -> Sequence:
        kept, length = self.prefixes.longest(request.prompt_ids)
        return Sequence(request, self.backend.open(kept, length), num_known=length)

    def _judge(self, live: list[Sequence], segments: list[Segment], hidden: Tensor) -> None:
        """Show the new siblings to their heads, and keep the branches taken."""
        states = hidden.split([len(segment.token_ids) for segment in segments])
        asked, shown = [], []
        for sequence, segment, state in zip(live, segments, states, strict=True):
            if segment.siblings:
                assert sequence.request.head is not None and sequence.tip is not None, "its prompt was fed before"
                asked.append(sequence)
                shown.append(Shown(sequence.request.head, state, sequence.tip))
            else:
                _settle_chain(sequence, len(segment.token_ids), state)
                if not sequence.pending and not sequence.token_ids:  # the prompt has just been read
                    self._keep_prefix(sequence, sequence.request.prompt_ids)
        rows, branches = [], []
        for sequence, (_, state, _), scores in zip(asked, shown, self._heads.score(shown), strict=True):
            sequence.stats.fed += len(scores)
            taken = sequence.judge(scores, state)
            if taken is not None:
                self.scheduler.observe(taken)
                rows.append(sequence.row)
                branches.append(taken)
                _keep_state(sequence)
        if rows:
            self.backend.commit(rows, branches)

    def _look_ahead(self, settled: list[Sequence]) -> None:
        """Rank the candidates of the next position of sequences whose last token is committed."""
        settled = [sequence for sequence in settled if sequence.finish_reason is None]
        if not settled:
            return
        logits = self.backend.logits(torch.stack([s.tip for s in settled])).float()  # type: ignore[misc]  # (B, V)
        for row, sequence in zip(logits, settled, strict=True):
            if sequence.request.constraint is not None:
                sequence.request.constraint.mask(row)
        sampling = [sequence.request.sampling for sequence in settled]
        candidates = rank_candidates(
            logits,
            top_k=[s.top_k for s in sampling],
            top_p=[s.top_p for s in sampling],
            temperature=[sequence.temperature or 1.0 for sequence in settled],
            min_candidates=[s.min_candidates for s in sampling],
        )
        columns = (candidates.token_ids, candidates.log_probs, candidates.hazard_logits)
        ids, log_probs, hazard_logits = (column.tolist() for column in columns)
        for sequence, n, *row in zip(settled, candidates.counts.tolist(), ids, log_probs, hazard_logits, strict=True):
            sequence.open_position(row[0][:n], row[1][:n], row[2][:n])

    def _retire(self) -> list[Sequence]:
        done = self.scheduler.retire()
        for sequence in done:
            if sequence.finish_reason is not None:  # all but its last token was fed: the next turn may begin with it
                self._keep_prefix(sequence, [*sequence.request.prompt_ids, *sequence.token_ids[:-1]])
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


def _settle_chain(sequence: Sequence, count: int, states: Tensor) -> None:
    """Tokens of a chain are committed by feeding them."""
    del sequence.pending[:count]
    sequence.tip = states[-1]
    if sequence.token_ids:
        sequence.stats.fed += count
    if not sequence.pending:
        _keep_state(sequence)


def _keep_state(sequence: Sequence) -> None:
    if sequence.request.keep_states:
        assert sequence.tip is not None
        sequence.states.append(sequence.tip.clone())
