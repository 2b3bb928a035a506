"""Gated decoding of many sequences. `Decoder.step` is the procedure of the paper."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from itertools import accumulate

import torch
from torch import Tensor

from mara_integrations.engine.backends.prefix_cache import PrefixCache, block_hashes
from mara_integrations.engine.backends.protocol import Backend, RowSize
from mara_integrations.engine.batch import BatchEntry, ends_alone, run_isolated
from mara_integrations.engine.candidates import Ranking
from mara_integrations.engine.faults import HEAD, described
from mara_integrations.engine.head_stacks import HeadStacks
from mara_integrations.engine.limits import EngineLimits
from mara_integrations.engine.ranking import rank
from mara_integrations.engine.request import Request
from mara_integrations.engine.scheduler import ACCELERATOR_KNEE, CPU_KNEE, Scheduler, Waiting
from mara_integrations.engine.sequence import NO_ROW, Position, Sequence
from mara_integrations.engine.speculation.cost import CostCurve, measure
from mara_integrations.engine.speculation.drafts import NgramSpeculation, Speculation, num_draftable, verify
from mara_integrations.errors import ConfigError, HeadError, in_one_line
from mara_integrations.models.memory import default_kv_bytes, in_mib
from mara_integrations.models.openmp import WaitingThreads

# Tokens that the prefix cache has room for where no limit is set, and its size where a token's is not known yet.
_PREFIX_TOKENS, _LEAST_PREFIX_BYTES = 8192, 64 << 20
# Most memory for what Q-heads make of candidates; on a GPU, to make it anew takes no longer than to look it up.
_KEPT_BYTES = 128 << 20
# After this many forwards in a row that failed for every sequence, the engine counts as failing.
_NUM_FAILING = 3
_log = logging.getLogger(__name__)


class Decoder:
    """Decodes requests on one backend, each with its own head and settings. Not thread-safe: see `worker.Worker`.

    Args:
        backend: Runs the base model.
        scheduler: Decides what each forward feeds; None makes one within the limits.
        speculation: Drafts tokens, for backends that can take them back.
        limits: How much memory and work the decoder takes on.
        kept_bytes: Most memory for what Q-heads make of candidates, see `HeadStacks`.

    Attributes:
        kv_bytes: Most memory for keys and values of live sequences, in bytes.
        prefixes: The kept prefixes.
    """

    def __init__(
        self,
        backend: Backend,
        scheduler: Scheduler | None = None,
        speculation: Speculation | None = None,
        limits: EngineLimits | None = None,
        kept_bytes: int = 0,
    ) -> None:
        self.backend = backend
        self.limits = limits or EngineLimits()
        self.scheduler = scheduler or Scheduler(
            max_live=self.limits.max_live, prefill_chunk=self.limits.prefill_chunk, knee=_knee(backend)
        )
        self.speculation = speculation or NgramSpeculation()
        if backend.reserve is None:
            self.kv_bytes = self.limits.kv_bytes or default_kv_bytes(backend.device)
            self.prefixes = PrefixCache(_prefix_cache_bytes(self.limits, backend, self.kv_bytes))
        else:
            self.kv_bytes = backend.reserve.row_bytes
            self.prefixes = PrefixCache(backend.reserve.prefix_bytes, backend.reserve.num_prefixes)
        self._heads = HeadStacks(kept_bytes)
        self._unclosed: list[int] = []  # rows of sequences that have ended
        self._num_failed = 0  # forwards in a row that failed for every sequence

    @classmethod
    def measured(cls, backend: Backend, limits: EngineLimits | None = None) -> Decoder:
        """Make a decoder whose widths follow the measured cost of a forward; takes about a second.

        On a CPU it also keeps what Q-heads make of candidates. Not for training: other widths, and what is kept, change
        the last digits, so an interrupted run would not resume bit for bit.
        """
        limits = limits or EngineLimits()
        cost = measure(backend, CostCurve.flat_to(_knee(backend)))
        scheduler = Scheduler(max_live=limits.max_live, prefill_chunk=limits.prefill_chunk, cost=cost)
        return cls(backend, scheduler, limits=limits, kept_bytes=_KEPT_BYTES if backend.device.type == "cpu" else 0)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ConfigError: See `check`.
        """
        self.check(request)
        kept_bytes = self.backend.kept_bytes(len(request.prompt_ids))
        keeps_prefix = kept_bytes is not None and kept_bytes <= self.prefixes.max_bytes
        blocks = block_hashes(request.prompt_ids) if self.prefixes.max_bytes else []
        self.scheduler.waiting.append(Waiting(request, self._size(request), blocks, keeps_prefix))

    def check(self, request: Request) -> None:
        """Refuse a request that can never be decoded; may be called in any thread.

        Raises:
            ConfigError: If the prompt is empty, or the request may need more memory than there is.
        """
        if not len(request.prompt_ids):
            raise ConfigError("the prompt is empty", hint="give it at least one token")
        size = self._size(request)
        needed = self.backend.bytes_for([size])
        if needed > self.kv_bytes:
            raise ConfigError(
                f"the request may need {in_mib(needed)} for keys and values of {size.num_tokens} tokens and "
                f"{size.num_siblings} candidates; the engine has {in_mib(self.kv_bytes)}",
                hint="lower max_new_tokens, shorten the prompt, or raise kv_bytes",
            )

    def _size(self, request: Request) -> RowSize:
        sampling, num_siblings = request.sampling, 0
        if request.feeds_candidates:
            num_siblings = max(sampling.top_k, sampling.min_candidates)
            if not self.scheduler.feeds_all:
                num_siblings = min(num_siblings, self.backend.max_siblings)
        return RowSize(len(request.prompt_ids) + sampling.max_new_tokens, num_siblings)

    def _fits(self, size: RowSize) -> bool:
        """Return whether there is memory for a row of this size beside the live ones."""
        return self.backend.bytes_for([*(sequence.size for sequence in self.scheduler.live), size]) <= self.kv_bytes

    @property
    def is_idle(self) -> bool:
        """Nothing is live or waiting."""
        return not self.scheduler.waiting and not self.scheduler.live

    @property
    def is_failing(self) -> bool:
        """The last forwards failed for every sequence: the model or its device is at fault, not a request."""
        return self._num_failed >= _NUM_FAILING

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

        A sequence that fails ends with its `error`, and the others go on.

        Raises:
            Exception: If the engine itself failed; `abort` comes next.
        """
        self.scheduler.admit(self._start, self._fits, self.prefixes)
        batch = self._forward(self._next_batch())  # hidden states of the candidates
        if batch:
            self._judge(batch)  # heads score them, gates decide, the branch taken is committed
            self._open_positions(batch)  # the next candidates
            self._verify_drafts(batch)  # of tokens fed ahead, keep those that are taken anyway
        return self._retire()

    def _start(self, waiting: Waiting) -> Sequence:
        """Begin a request on a row of its own, with what is kept of its prompt."""
        request = waiting.request
        kept, length = self.prefixes.longest(request.prompt_ids, waiting.blocks)
        try:
            return Sequence(request, self.backend.open(kept, length), length, waiting.size)
        except Exception as error:
            sequence = Sequence(request, NO_ROW)
            sequence.fail(described(error, "opening a row for this request"))
            return sequence

    def _next_batch(self) -> list[BatchEntry]:
        """Decide what each sequence feeds: pending tokens, or candidates of its position, and drafted tokens."""
        batch = []
        for sequence, chunk in self.scheduler.plan():
            draft = self._draft(sequence)
            if sequence.position is None:
                due = sequence.pending[:chunk]
            else:
                width = 1 if draft else self._width(sequence, sequence.position)
                num_fed = len(sequence.position.states)
                due = sequence.position.token_ids[num_fed : num_fed + width]
            batch.append(BatchEntry(sequence, due, draft))
        return batch

    def _width(self, sequence: Sequence, position: Position) -> int:
        """Choose how many candidates to feed, and forget rejected ones where a row would hold too many."""
        width = self.scheduler.width(sequence)
        if self.scheduler.feeds_all:
            return width
        width, num_fed = min(width, self.backend.max_siblings), len(position.states)
        if num_fed - position.num_dropped + width > self.backend.max_siblings:
            self.backend.drop_siblings(sequence.row)
            position.num_dropped = num_fed
        return width

    def _forward(self, batch: Seq[BatchEntry]) -> list[BatchEntry]:
        """Feed the batch to the base model, which commits pending tokens; returns the entries that were fed."""

        def feed(entries: Seq[BatchEntry]) -> Seq[Tensor]:
            segments = [entry.segment for entry in entries]
            hidden = self.backend.feed(segments)  # (T, d)
            return list(hidden.split([len(segment.token_ids) for segment in segments]))

        fed = run_isolated(batch, feed, "the model's forward on this request")
        if batch:
            self._num_failed = 0 if fed else self._num_failed + 1
        for entry, states in fed:
            entry.take_states(states)
        return [entry for entry, _ in fed]

    def _judge(self, batch: Seq[BatchEntry]) -> None:
        """Score candidates with their heads, let the gates decide, and commit the branches taken."""

        def score(entries: Seq[BatchEntry]) -> Seq[list[float]]:
            return self._heads.score([entry.head_input() for entry in entries])

        for entry, scores in run_isolated([e for e in batch if e.needs_head], score, HEAD, HeadError):
            with ends_alone(entry.sequence):
                entry.take_scores(scores)
        rows, branches = [], []
        for entry in batch:
            sequence, position, verdict = entry.sequence, entry.sequence.position, None
            if position is None or sequence.has_ended:
                continue
            with ends_alone(sequence):
                verdict = sequence.judge(entry.scores, entry.states)
            if verdict is not None:
                self.scheduler.observe(verdict)
                if verdict.taken < position.num_dropped:
                    self.backend.drop_siblings(sequence.row)
                    if not sequence.has_ended:
                        sequence.feed_again()
                elif not entry.draft:  # a chain is committed by being fed
                    rows.append(sequence.row)
                    branches.append(verdict.taken - position.num_dropped)
            elif entry.draft and not sequence.has_ended:  # the first candidate was rejected: it is a branch like others
                self.backend.retract(sequence.row, 1 + len(entry.draft), held=True)
        if rows:
            self.backend.commit(rows, branches)

    def _open_positions(self, batch: Seq[BatchEntry]) -> None:
        """Rank the candidates of the next position of each settled sequence, and of the positions after its draft."""
        settled = [entry for entry in batch if entry.sequence.is_settled]
        for entry in settled:
            if not entry.sequence.token_ids:  # its prompt has just been read
                self._keep_prefix(entry.sequence, entry.sequence.request.prompt_ids)
        for entry, logits in run_isolated(settled, self._logits, "computing the logits of this request"):
            entry.logits = logits
            with ends_alone(entry.sequence):
                entry.sequence.mask(logits[0])
        settled = [entry for entry in settled if entry.sequence.is_settled]  # without those that failed
        for entry, rankings in run_isolated(settled, self._rankings, "ranking the candidates of this request"):
            entry.rankings = rankings
            with ends_alone(entry.sequence):
                self._open(entry, rankings[0], entry.logits[0], entry.ranked_states[0])

    def _open(self, entry: BatchEntry, ranking: Ranking, logits: Tensor, hidden: Tensor) -> None:
        """Open a position, given its candidates, the logits (V,) they are from, and the state before it, (d,)."""
        while entry.sequence.refuses(ranking):
            entry.sequence.mask_refused(logits)
            ranking = rank([entry.sequence], hidden[None], logits[None], self.backend, self._heads)[0]
        entry.open_position(ranking, logits)

    def _logits(self, entries: Seq[BatchEntry]) -> Seq[Tensor]:
        """Logits after the last token of each sequence and after its drafted tokens, (1 + m, V) each."""
        hidden = torch.cat([entry.ranked_states for entry in entries])
        rows = [entry.sequence.row for entry in entries for _ in range(1 + len(entry.draft))]
        logits = self.backend.next_logits(hidden, rows).float()  # (B, V)
        return list(logits.split([1 + len(entry.draft) for entry in entries]))

    def _rankings(self, entries: Seq[BatchEntry]) -> Seq[list[Ranking]]:
        """Candidates of the next position of each sequence, and of the positions after its drafted tokens, 1 + m."""
        owners = [entry.sequence for entry in entries for _ in entry.logits]
        hidden = torch.cat([entry.ranked_states for entry in entries])
        rankings = rank(owners, hidden, torch.cat([entry.logits for entry in entries]), self.backend, self._heads)
        ends = list(accumulate(len(entry.logits) for entry in entries))
        return [rankings[end - len(entry.logits) : end] for entry, end in zip(entries, ends, strict=True)]

    def _open_after(self, entry: BatchEntry, num_drafted: int) -> None:
        """Open the position after this many drafted tokens, once these are committed."""
        logits, ranking = entry.logits[num_drafted], entry.rankings[num_drafted]
        hidden = entry.draft_states[num_drafted - 1]
        if entry.sequence.request.constraint is not None:
            entry.sequence.mask(logits)  # what may follow depends on the tokens before, which are known only now
            ranking = rank([entry.sequence], hidden[None], logits[None], self.backend, self._heads)[0]
        self._open(entry, ranking, logits, hidden)

    # --- speculation

    def _draft(self, sequence: Sequence) -> list[int]:
        """Tokens to feed ahead of a sequence."""
        most = num_draftable(sequence) if self.backend.can_retract else 0
        if not most:
            return []
        return self.speculation.draft(sequence, lambda right: min(most, self.scheduler.num_drafted(sequence, right)))

    def _verify_drafts(self, batch: Seq[BatchEntry]) -> None:
        """Commit drafted tokens that are taken anyway, and take the others back out of the row."""
        for entry in batch:
            sequence, num_drafted = entry.sequence, len(entry.draft)
            if not num_drafted or not entry.rankings or sequence.error is not None:
                continue
            with ends_alone(sequence):
                num_kept = verify(entry, self._open_after)
                self.speculation.observe(sequence, num_kept, num_drafted)
            if sequence.error is None and num_kept < num_drafted:
                holds_branch = sequence.position is not None and bool(sequence.position.states)
                self.backend.retract(sequence.row, num_drafted - num_kept, held=holds_branch)

    # --- ends

    def _retire(self) -> list[Sequence]:
        done = self.scheduler.retire()
        for sequence in done:
            if sequence.finish_reason is not None and sequence.error is None:
                # the next turn of a conversation may begin with everything that was fed
                num_fed = len(sequence.token_ids) - max(1, len(sequence.pending))
                self._keep_prefix(sequence, [*sequence.request.prompt_ids, *sequence.token_ids[:num_fed]])
            if sequence.row != NO_ROW:
                self._unclosed.append(sequence.row)
        self._close_rows()
        return done

    def _close_rows(self) -> None:
        """Close the rows of sequences that have ended; one that can't be closed is tried again by `abort`."""
        while self._unclosed:
            self.backend.close(self._unclosed[-1])
            self._unclosed.pop()

    def _keep_prefix(self, sequence: Sequence, token_ids: Seq[int]) -> None:
        try:
            self.prefixes.add(token_ids, lambda: self.backend.keep(sequence.row, len(token_ids)))
        except Exception as error:  # there may be no memory for a copy; it would only have saved time
            _log.warning("a prefix of %d tokens is not kept: %s", len(token_ids), in_one_line(error))

    def abort(self) -> None:
        """Drop everything that is live or waiting, as after an error in `step`.

        Raises:
            Exception: If a row can't be closed. The decoder can't be used any more then.
        """
        self._unclosed += [sequence.row for sequence in self.scheduler.clear() if sequence.row != NO_ROW]
        self._close_rows()

    def run(self, requests: Iterable[Request], on_done: Callable[[Sequence], None] | None = None) -> list[Sequence]:
        """Decode all requests to their ends, in batches; returns their sequences in order.

        Raises:
            Exception: What failed in one of them, or in the engine; the others are dropped.
        """
        requests = list(requests)
        finished: dict[int, Sequence] = {}
        threads = WaitingThreads(self.backend.device.type == "cpu")
        try:
            for request in requests:
                self.submit(request)
            while not self.is_idle:
                with threads.observed():
                    done = self.step()
                for sequence in done:
                    if sequence.error is not None:
                        raise sequence.error
                    finished[id(sequence.request)] = sequence
                    if on_done is not None:
                        on_done(sequence)
        except BaseException:
            self.abort()
            raise
        finally:
            threads.close()
        return [finished[id(request)] for request in requests]


def _prefix_cache_bytes(limits: EngineLimits, backend: Backend, kv_bytes: int) -> int:
    if limits.prefix_cache_bytes is not None:
        return limits.prefix_cache_bytes
    return max(_LEAST_PREFIX_BYTES, min(backend.kept_bytes(_PREFIX_TOKENS) or 0, kv_bytes // 4))


def _knee(backend: Backend) -> int:
    return CPU_KNEE if backend.device.type == "cpu" else ACCELERATOR_KNEE
