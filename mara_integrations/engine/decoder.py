"""Gated decoding of many sequences. `Decoder.step` is the procedure of the paper."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch import Tensor

from mara_integrations.engine.backends.prefix_cache import PrefixCache
from mara_integrations.engine.backends.protocol import Backend
from mara_integrations.engine.batch import BatchEntry
from mara_integrations.engine.candidates import Candidates, Ranking, rank_candidates
from mara_integrations.engine.gate import q_accept_logits
from mara_integrations.engine.head_stacks import HeadStacks, PositionInput
from mara_integrations.engine.limits import EngineLimits
from mara_integrations.engine.request import Request
from mara_integrations.engine.scheduler import ACCELERATOR_KNEE, CPU_KNEE, Scheduler
from mara_integrations.engine.sequence import Sequence
from mara_integrations.engine.speculation.cost import CostCurve, measure
from mara_integrations.engine.speculation.drafts import NgramSpeculation, Speculation, num_draftable, verify


class Decoder:
    """Decodes requests on one backend, each with its own head and settings. Not thread-safe: see `worker.Worker`.

    Args:
        backend: Runs the base model.
        scheduler: Decides what each forward feeds; None makes one within the limits.
        speculation: Drafts tokens, for backends that can take them back.
        limits: How much memory and work the decoder takes on.
    """

    def __init__(
        self,
        backend: Backend,
        scheduler: Scheduler | None = None,
        speculation: Speculation | None = None,
        limits: EngineLimits | None = None,
    ) -> None:
        self.backend = backend
        self.limits = limits or EngineLimits()
        self.scheduler = scheduler or Scheduler(
            max_live=self.limits.max_live, prefill_chunk=self.limits.prefill_chunk, knee=_knee(backend)
        )
        self.speculation = speculation or NgramSpeculation()
        self.prefixes = PrefixCache()
        self._heads = HeadStacks()

    @classmethod
    def measured(cls, backend: Backend, limits: EngineLimits | None = None) -> Decoder:
        """Make a decoder whose widths follow the measured cost of a forward; takes about a second.

        Not for training: other widths change the last digits, so an interrupted run would not resume bit for bit.
        """
        limits = limits or EngineLimits()
        cost = measure(backend, CostCurve.flat_to(_knee(backend)))
        scheduler = Scheduler(max_live=limits.max_live, prefill_chunk=limits.prefill_chunk, cost=cost)
        return cls(backend, scheduler, limits=limits)

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
        """Run one forward for all sequences that are due; returns those that have finished.

        The procedure of the paper (Zhang et al. 2025, arXiv 2505.19743, section 3), for each sequence:

            candidates = the tokens that top-k and top-p leave, most probable first
            for each candidate: feed it to the base model; the head scores the hidden state after it
            take the first candidate that the gate accepts; if it rejects all of them, take the fallback
            the forward of the token taken has computed the logits that the next candidates come from

        A forward carries several candidates of a position as siblings, and many sequences. The logits, the most
        expensive part of a small model, are computed from the states of accepted tokens only.
        """
        self.scheduler.admit(self._start, self.prefixes)
        batch = self._next_batch()
        if batch:
            self._forward(batch)  # hidden states of the candidates
            self._judge(batch)  # heads score them, gates decide, the branch taken is committed
            self._open_positions(batch)  # the next candidates
            self._verify_drafts(batch)  # of tokens fed ahead, keep those that are taken anyway
        return self._retire()

    def _start(self, request: Request) -> Sequence:
        kept, length = self.prefixes.longest(request.prompt_ids)
        return Sequence(request, self.backend.open(kept, length), num_known=length)

    def _next_batch(self) -> list[BatchEntry]:
        """Decide what each sequence feeds: pending tokens, or candidates of its position, and drafted tokens."""
        batch = []
        for sequence, chunk in self.scheduler.plan():
            draft = self._draft(sequence)
            if sequence.position is None:
                due = sequence.pending[:chunk]
            else:
                width = 1 if draft else self.scheduler.width(sequence)
                num_fed = len(sequence.position.states)
                due = sequence.position.token_ids[num_fed : num_fed + width]
            batch.append(BatchEntry(sequence, due, draft))
        return batch

    def _forward(self, batch: Seq[BatchEntry]) -> None:
        """Feed the batch to the base model; pending tokens are committed by it."""
        segments = [entry.segment for entry in batch]
        hidden = self.backend.feed(segments)  # (T, d)
        states = hidden.split([len(segment.token_ids) for segment in segments])
        for entry, own_states in zip(batch, states, strict=True):
            entry.take_states(own_states)

    def _judge(self, batch: Seq[BatchEntry]) -> None:
        """Score candidates with their heads, let the gates decide, and commit the branches taken."""
        inputs = [(entry, head_input) for entry in batch if (head_input := entry.head_input()) is not None]
        scores = self._heads.score([head_input for _, head_input in inputs])
        for (entry, _), own_scores in zip(inputs, scores, strict=True):
            entry.take_scores(own_scores)
        rows, branches = [], []
        for entry in batch:
            sequence = entry.sequence
            if sequence.position is None:
                continue
            verdict = sequence.judge(entry.scores, entry.states)
            if verdict is not None:
                self.scheduler.observe(verdict)
                if not entry.draft:  # a chain is committed by being fed
                    rows.append(sequence.row)
                    branches.append(verdict.taken)
            elif entry.draft:  # the first candidate was rejected: it becomes a branch, and its draft is worthless
                self.backend.retract(sequence.row, 1 + len(entry.draft), held=True)
        if rows:
            self.backend.commit(rows, branches)

    def _open_positions(self, batch: Seq[BatchEntry]) -> None:
        """Rank the candidates of the next position of each settled sequence, and of the positions after its draft."""
        settled = [entry for entry in batch if entry.sequence.is_settled]
        if not settled:
            return
        states, owners = [], []
        for entry in settled:
            if not entry.sequence.token_ids:  # its prompt has just been read
                self._keep_prefix(entry.sequence, entry.sequence.request.prompt_ids)
            assert entry.sequence.last_state is not None, "a settled sequence has fed something"
            states += [entry.sequence.last_state, *entry.draft_states]
            owners += [entry.sequence] * (1 + len(entry.draft))
        hidden = torch.stack(states)
        logits = self.backend.logits(hidden).float()  # (B, V)
        start = 0
        for entry in settled:
            entry.logits = logits[start : start + 1 + len(entry.draft)]
            start += len(entry.logits)
            if entry.sequence.request.constraint is not None:
                entry.sequence.request.constraint.mask(entry.logits[0])
        rankings = self._rank(owners, hidden, logits)
        start = 0
        for entry in settled:
            entry.rankings = rankings[start : start + len(entry.logits)]
            start += len(entry.rankings)
            entry.sequence.open_position(entry.rankings[0])

    def _rank(self, sequences: Seq[Sequence], hidden: Tensor, logits: Tensor) -> list[Ranking]:
        """Rank the candidates of one position of each sequence, and let its Q-heads score them.

        Args:
            sequences: B of them; one that has drafted tokens is there several times.
            hidden: Hidden state before each position, (B, d).
            logits: Logits made of these and masked by constraints, (B, V).
        """
        sampling = [sequence.request.sampling for sequence in sequences]
        candidates = rank_candidates(
            logits,
            top_k=[s.top_k for s in sampling],
            top_p=[s.top_p for s in sampling],
            temperature=[sequence.temperature or 1.0 for sequence in sequences],
            min_candidates=[s.min_candidates for s in sampling],
        )
        return self._weigh(sequences, hidden, candidates).rankings()

    def _weigh(self, sequences: Seq[Sequence], hidden: Tensor, candidates: Candidates) -> Candidates:
        """Give candidates the accept logits of their Q-heads, which need no forward of the candidates."""
        counts = candidates.counts.tolist()
        inputs, rows = [], []
        for row, sequence in enumerate(sequences):
            if sequence.q_head is not None and counts[row] > 1:
                inputs.append(PositionInput(sequence.q_head, hidden[row], counts[row]))
                rows.append(row)
        if not rows:
            return candidates
        live = candidates.live[rows]  # (R, K)
        token_ids = candidates.token_ids[rows][live].to(hidden.device)  # (N,)
        scores = self._heads.score_positions(inputs, self.backend.output_embeddings(token_ids)).cpu()
        strengths = torch.tensor([[sequences[row].request.gate.strength] for row in rows])
        accept_logits = candidates.accept_logits.clone()
        accept_logits[rows] = q_accept_logits(
            candidates.hazard_logits[rows], torch.zeros(live.shape).masked_scatter_(live, scores), strengths, live
        )
        return replace(candidates, accept_logits=accept_logits)

    # --- speculation

    def _draft(self, sequence: Sequence) -> list[int]:
        """Tokens to feed ahead of a sequence."""
        most = num_draftable(sequence) if self.backend.can_retract else 0
        if not most:
            return []
        return self.speculation.draft(sequence, lambda right: min(most, self.scheduler.num_drafted(sequence, right)))

    def _ranking_after(self, entry: BatchEntry, num_drafted: int) -> Ranking:
        """Candidates of the position after this many drafted tokens, once these are committed."""
        constraint = entry.sequence.request.constraint
        if constraint is None or num_drafted == 0:
            return entry.rankings[num_drafted]
        logits = entry.logits[num_drafted]
        constraint.mask(logits)  # what may follow depends on the tokens before, which are known only now
        return self._rank([entry.sequence], entry.draft_states[num_drafted - 1][None], logits[None])[0]

    def _verify_drafts(self, batch: Seq[BatchEntry]) -> None:
        """Commit drafted tokens that are taken anyway, and take the others back out of the row."""
        for entry in batch:
            if entry.draft and entry.rankings:
                sequence, num_drafted = entry.sequence, len(entry.draft)
                num_kept = verify(entry, self._ranking_after)
                self.speculation.observe(sequence, num_kept, num_drafted)
                if num_kept < num_drafted:
                    holds_branch = sequence.position is not None and bool(sequence.position.states)
                    self.backend.retract(sequence.row, num_drafted - num_kept, held=holds_branch)

    # --- ends

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
