"""Which sequences compute which tokens in the next forward pass.

Continuous batching with chunked prefill: every step gives each running sequence its next token and spends what is
left of the token budget on prompts, first come first served within a priority. A prompt whose beginning a running
sequence is just computing waits until it can have it from the cache, while others go ahead. Where memory runs short
the last in that order is preempted: its slot is released, and later it gets back what was kept of its keys and
values, or computes its tokens again.

The beams of one request are preempted together. They then compute what they have in common once, and fork.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import partial

from vattention.engine.plan import Plan
from vattention.engine.preemption import Swapper
from vattention.engine.residents import Residents
from vattention.engine.sequence import Sequence
from vattention.errors import DriverError, OutOfMemoryError
from vattention.kv.manager import KVManager

_MOST_PASSED_OVER = 32
"""Waiting sequences that others overtake in one step, at most: each costs a look into the prefix cache."""


class Scheduler:
    """Owns the waiting and the running sequences.

    Args:
        manager: the KV cache whose slots and memory are handed out.
        swapper: keeps what preempted sequences have computed.
        max_num_seqs: most sequences that run at the same time.
        max_num_batched_tokens: most tokens in one forward.
        max_logit_rows: most tokens of one chunk where each needs its logits, as for prompt logprobs.
    """

    def __init__(
        self,
        manager: KVManager,
        swapper: Swapper,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_logit_rows: int,
    ) -> None:
        self._manager = manager
        self._residents = Residents(manager, swapper, max_num_seqs)
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_logit_rows = max_logit_rows
        self._waiting: list[tuple[tuple[int, int, int], Sequence]] = []

    @property
    def running(self) -> list[Sequence]:
        return self._residents.running

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for a slot."""
        heapq.heappush(self._waiting, (sequence.priority, sequence))

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child` run on from what `parent` has computed, sharing its memory; where there is no slot or memory
        for that, it waits and computes its tokens itself.
        """
        try:
            forked = self._residents.fork(parent, child)
        except DriverError:
            forked = False
        if not forked:
            self.add(child)

    def hand_over(self, parent: Sequence, child: Sequence) -> None:
        """Let `child` run on in `parent`'s slot, in its place."""
        self._residents.hand_over(parent, child)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, running, waiting or neither; its memory is free on return."""
        if sequence.slot is not None:
            self._residents.leave(sequence)
        else:
            self._waiting = [entry for entry in self._waiting if entry[1] is not sequence]
            heapq.heapify(self._waiting)
        sequence.free_image()

    def schedule(self) -> Plan:
        """Plan the next forward and provide its memory. An empty plan means there is nothing to do."""
        plan = Plan()
        units = self._residents.units()
        while self._manager.excess_nbytes and len(units) > 1:
            self._preempt(units.pop(), plan)
        self._continue_running(plan)
        if not plan.preempted:
            self._admit_waiting(plan)
        return plan

    def advance(self, plan: Plan) -> None:
        """The plan's forward is done: its tokens are in their slots, where others may share them."""
        for chunk, sequence in zip(plan.chunks, plan.sequences, strict=True):
            self._residents.computed(sequence, chunk.start, chunk.end)

    def _continue_running(self, plan: Plan) -> None:
        queue = self._residents.units()
        decodes = sum(sequence.num_tokens - sequence.num_computed == 1 for unit in queue for sequence in unit)
        for_prompts = max(self._max_num_batched_tokens - decodes, 0)
        while queue and plan.num_tokens < self._max_num_batched_tokens:
            unit = queue.pop(0)
            try:
                self._fork_beams(unit, queue, plan)
                for sequence in list(unit):
                    remaining = sequence.num_computable - sequence.num_computed
                    room = self._max_num_batched_tokens - plan.num_tokens
                    wanted = min(remaining, room, for_prompts if remaining > 1 else 1)
                    count = self._chunk_length(sequence, wanted)
                    if count and unit:
                        count = self._secure(partial(self._residents.provide, sequence), count, unit, queue, plan)
                    if count and unit:
                        for_prompts -= count if remaining > 1 else 0
                        plan.put(sequence, count)
            except DriverError as error:
                plan.withdraw(unit)
                plan.failed.append((unit[0], error))

    def _fork_beams(self, unit: list[Sequence], queue: list[list[Sequence]], plan: Plan) -> None:
        """Give slots to those beams of a unit that have none, as soon as there is what they are to fork from."""
        beams = unit[0].request.beams
        if beams is None:
            return
        forks = beams.forks

        def fork(_: int) -> bool:
            return self._residents.fork(forks[0].parent, forks[0].child)

        while forks and forks[0].parent.num_computed >= beams.fork_at and self._secure(fork, 1, unit, queue, plan):
            unit.append(forks.pop(0).child)

    def _secure(
        self,
        attempt: Callable[[int], bool],
        count: int,
        unit: list[Sequence],
        queue: list[list[Sequence]],
        plan: Plan,
    ) -> int:
        """Preempt those that come after `unit`, the last first, until the attempt at `count` succeeds; if nobody is
        left, attempt less. Returns the count that succeeded, or 0.

        A sequence that has nobody after it is preempted itself in the end. Beams keep what they have and try again
        in the next step: whoever goes before them takes it if he must. They fail if they are alone and none of them
        can go on.
        """
        while not attempt(count):
            if queue:
                self._preempt(queue.pop(), plan)
            elif count > 1:
                count = _shorter(count)
            elif unit[0].request.beams is None or (len(unit) == len(self.running) and not plan.chunks):
                self._preempt(unit, plan)
                unit.clear()
                return 0
            else:
                return 0
        return count

    def _admit_waiting(self, plan: Plan) -> None:
        passed_over: list[Sequence] = []
        while self._waiting and (budget := self._max_num_batched_tokens - plan.num_tokens) > 0:
            sequence = self._waiting[0][1]
            if not self._manager.fits(sequence.num_tokens):
                heapq.heappop(self._waiting)
                plan.failed.append((sequence, self._too_large(sequence)))
                continue
            if self.running and sequence.image is None and self._residents.awaits(sequence):
                if len(passed_over) == _MOST_PASSED_OVER:
                    break
                heapq.heappop(self._waiting)
                passed_over.append(sequence)
                continue
            if self.running and not self._residents.has_room(sequence):
                break
            heapq.heappop(self._waiting)
            try:
                admitted = self._admit(sequence, budget, plan)
            except DriverError as error:
                plan.failed.append((sequence, error))
                continue
            if not admitted and self.running:
                self.add(sequence)
                break
            if not admitted:
                plan.failed.append((sequence, self._too_large(sequence)))
        for sequence in passed_over:
            self.add(sequence)

    def _admit(self, sequence: Sequence, budget: int, plan: Plan) -> bool:
        """Give a sequence a slot and its first chunk; False where memory is short."""
        num_cached = self._residents.admit(sequence)
        if num_cached is None:
            return False
        if sequence.request.num_cached_tokens is None:
            sequence.request.num_cached_tokens = num_cached
        num_looked_up = len(sequence.wanted_token_ids)
        count = self._chunk_length(sequence, min(sequence.num_computable - sequence.num_computed, budget))
        while not self._residents.provide(sequence, count):
            if count <= 1:
                self._residents.leave(sequence)
                return False
            count = _shorter(count)
        if count:
            plan.put(sequence, count)
        plan.num_looked_up_tokens += num_looked_up
        plan.num_cached_tokens += num_cached
        sequence.free_image()
        return True

    def _chunk_length(self, sequence: Sequence, wanted: int) -> int:
        return min(wanted, self._max_logit_rows) if sequence.reports_prompt else wanted

    def _preempt(self, unit: list[Sequence], plan: Plan) -> None:
        """Take a unit's memory and let it wait. Alone it fails: it would only come back to the same end."""
        alone = len(unit) == len(self.running)
        for sequence in unit:
            # Beams fork again when they come back, from tokens that only one of them needs to compute.
            self._residents.leave(sequence, keep=not alone and sequence.request.beams is None)
        beams = unit[0].request.beams
        first = unit[0] if beams is None else beams.restart()
        if alone:
            plan.failed.append((first, self._too_large(first)))
        else:
            plan.preempted += unit
            self.add(first)

    def _too_large(self, sequence: Sequence) -> OutOfMemoryError:
        accounts = self._manager.accounts()
        needed = accounts.mapped_nbytes - accounts.warm_nbytes
        beams = sequence.request.beams
        subject = (
            f"a sequence of {sequence.num_tokens:,} tokens does"
            if beams is None
            else f"{beams.width} beams of {sequence.num_tokens:,} tokens do"
        )
        return OutOfMemoryError(
            max(needed, accounts.limit_nbytes + 1),
            accounts.limit_nbytes,
            f"{subject} not fit into the KV cache even alone; raise kv_memory or free memory on this machine",
        )


def _shorter(count: int) -> int:
    """A chunk to try where there is no memory for one of `count` tokens.

    One token needs the least: in a layer with a sliding window, a chunk needs all that any of its tokens sees.
    """
    return count // 2
