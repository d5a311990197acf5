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
from dataclasses import dataclass, field
from functools import partial

from vattention.core import Chunk
from vattention.engine.preemption import Swapper
from vattention.engine.sequence import Sequence
from vattention.errors import DriverError, OutOfMemoryError, VAttentionError
from vattention.kv.manager import KVManager, Placement

_MOST_PASSED_OVER = 32
"""Waiting sequences that others overtake in one step, at most: each costs a look into the prefix cache."""


@dataclass(slots=True)
class Plan:
    """One forward pass.

    Attributes:
        chunks: what to compute; `sequences` has their owners, in the same order.
        preempted: sequences that lost their slot to make room.
        failed: sequences that can never fit or that the driver fails, with the reason.
        num_tokens: of all chunks.
        num_looked_up_tokens: of sequences that got a slot; of these the prefix cache had `num_cached_tokens`.
    """

    chunks: list[Chunk] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    failed: list[tuple[Sequence, VAttentionError]] = field(default_factory=list)
    num_tokens: int = 0
    num_looked_up_tokens: int = 0
    num_cached_tokens: int = 0

    def withdraw(self, unit: list[Sequence]) -> None:
        """Compute nothing of these sequences."""
        kept = [(c, s) for c, s in zip(self.chunks, self.sequences, strict=True) if s not in unit]
        self.chunks, self.sequences = [chunk for chunk, _ in kept], [sequence for _, sequence in kept]
        self.num_tokens = sum(len(chunk.token_ids) for chunk in self.chunks)


class Scheduler:
    """Owns the waiting and the running sequences.

    Args:
        manager: the KV cache whose slots and memory are handed out.
        swapper: keeps what preempted sequences have computed.
        max_num_batched_tokens: most tokens in one forward.
        max_logit_rows: most tokens of one chunk where each needs its logits, as for prompt logprobs.
    """

    def __init__(
        self, manager: KVManager, swapper: Swapper, *, max_num_batched_tokens: int, max_logit_rows: int
    ) -> None:
        self._manager = manager
        self._swapper = swapper
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_logit_rows = max_logit_rows
        self._waiting: list[tuple[tuple[int, int, int], Sequence]] = []
        self.running: list[Sequence] = []

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
            forked = self._fork(parent, child)
        except DriverError:
            forked = False
        if not forked:
            self.add(child)

    def hand_over(self, parent: Sequence, child: Sequence) -> None:
        """Let `child` run on in `parent`'s slot, in its place."""
        self.running[self.running.index(parent)] = child
        child.slot, child.num_computed, child.num_promised = parent.slot, parent.num_computed, parent.num_promised
        parent.slot, parent.num_computed, parent.num_promised = None, 0, 0

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, running, waiting or neither; its memory is free on return."""
        if sequence.slot is not None:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self._waiting = [entry for entry in self._waiting if entry[1] is not sequence]
            heapq.heapify(self._waiting)
        _free_image(sequence)

    def schedule(self) -> Plan:
        """Plan the next forward and provide its memory. An empty plan means there is nothing to do."""
        plan = Plan()
        units = self._units()
        while self._manager.excess_nbytes and len(units) > 1:
            self._preempt(units.pop(), plan)
        self._continue_running(plan)
        if not plan.preempted:
            self._admit_waiting(plan)
        return plan

    def advance(self, plan: Plan) -> None:
        """The plan's forward is done: its tokens are in their slots, where others may share them."""
        for chunk, sequence in zip(plan.chunks, plan.sequences, strict=True):
            sequence.num_computed = chunk.end
            if chunk.start < sequence.num_promised:
                self._manager.computed(chunk.slot, min(chunk.end, sequence.num_promised))

    def _units(self) -> list[list[Sequence]]:
        """What is preempted together: single sequences, and all beams of a request, by priority."""
        units: dict[object, list[Sequence]] = {}
        for sequence in sorted(self.running, key=_priority):
            units.setdefault(sequence.request.beams or sequence, []).append(sequence)
        return list(units.values())

    def _continue_running(self, plan: Plan) -> None:
        queue = self._units()
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
                    if count and unit and self._secure(partial(self._provide, sequence, count), unit, queue, plan):
                        for_prompts -= count if remaining > 1 else 0
                        self._put(sequence, count, plan)
            except DriverError as error:
                plan.withdraw(unit)
                plan.failed.append((unit[0], error))

    def _fork_beams(self, unit: list[Sequence], queue: list[list[Sequence]], plan: Plan) -> None:
        """Give slots to those beams of a unit that have none, as soon as there is what they are to fork from."""
        beams = unit[0].request.beams
        while beams is not None and beams.forks:
            parent, child = beams.forks[0].parent, beams.forks[0].child
            if parent.num_computed < beams.fork_at:
                return
            if not self._secure(partial(self._fork, parent, child), unit, queue, plan):
                return
            beams.forks.pop(0)
            unit.append(child)

    def _secure(
        self, attempt: Callable[[], bool], unit: list[Sequence], queue: list[list[Sequence]], plan: Plan
    ) -> bool:
        """Preempt those that come after `unit`, the last first, until the attempt succeeds.

        A sequence that has nobody after it is preempted itself. Beams keep what they have and try again in the next
        step: whoever goes before them takes it if he must. They fail if they are alone and none of them can go on.
        """
        while not attempt():
            if queue:
                self._preempt(queue.pop(), plan)
            elif unit[0].request.beams is None or (len(unit) == len(self.running) and not plan.chunks):
                self._preempt(unit, plan)
                unit.clear()
                return False
            else:
                return False
        return True

    def _admit_waiting(self, plan: Plan) -> None:
        passed_over: list[Sequence] = []
        while self._waiting and (budget := self._max_num_batched_tokens - plan.num_tokens) > 0:
            sequence = self._waiting[0][1]
            if not self._manager.fits(sequence.num_tokens):
                heapq.heappop(self._waiting)
                plan.failed.append((sequence, self._too_large(sequence)))
                continue
            if self.running and sequence.image is None and self._awaits(sequence):
                if len(passed_over) == _MOST_PASSED_OVER:
                    break
                heapq.heappop(self._waiting)
                passed_over.append(sequence)
                continue
            if self.running and not self._has_room(sequence):
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

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence fits beside those that run, with the slots that beams will need."""
        groups = {running.request.beams for running in self.running} - {None}
        num_held = sum(running.request.beams is not None for running in self.running)
        num_spoken_for = sum(beams.width for beams in groups if beams is not None) - num_held
        num_needed = 1 if sequence.request.beams is None else sequence.request.beams.width
        # An image goes into a slot of its own, which shares nothing.
        token_ids = self._promised(sequence) if sequence.image is None else []
        return self._manager.num_free_slots >= num_spoken_for + num_needed and self._manager.has_room(
            sequence.num_tokens + 1, token_ids, salt=sequence.request.cache_salt
        )

    def _promised(self, sequence: Sequence) -> list[int]:
        """The tokens that a waiting sequence will compute or find in the cache."""
        return sequence.token_ids(0, min(sequence.num_computable + 1, sequence.num_tokens))

    def _awaits(self, sequence: Sequence) -> bool:
        """Whether a running sequence is computing what this one could have from the cache soon."""
        tokens = sequence.token_ids(0, sequence.num_tokens)
        return self._manager.awaits(tokens, salt=sequence.request.cache_salt)

    def _admit(self, sequence: Sequence, budget: int, plan: Plan) -> bool:
        """Give a sequence a slot and its first chunk; False where memory is short."""
        request, token_ids = sequence.request, self._promised(sequence)
        try:
            num_cached = self._place(sequence, token_ids)
        except OutOfMemoryError:
            return False
        if request.num_cached_tokens is None:
            request.num_cached_tokens = num_cached
        self.running.append(sequence)
        count = self._chunk_length(sequence, min(sequence.num_computable - sequence.num_computed, budget))
        if self._provide(sequence, count):
            if count:
                self._put(sequence, count, plan)
            plan.num_looked_up_tokens += len(token_ids)
            plan.num_cached_tokens += num_cached
            _free_image(sequence)
            return True
        self.running.remove(sequence)
        self._release(sequence)
        return False

    def _place(self, sequence: Sequence, token_ids: list[int]) -> int:
        """Give a sequence a slot that holds what its image has, or what the prefix cache has of `token_ids`, its
        first ones; returns how many the cache gave.
        """
        placement, image = self._take(sequence, token_ids), sequence.image
        if image is not None and self._swapper.pays(image, placement.num_cached_tokens):
            # What the cache gave may be others' too: an image needs a slot of its own.
            self._manager.release(placement.slot)
            slot = self._take(sequence, []).slot
            try:
                self._manager.ensure(slot, image.num_tokens, image.num_tokens)
                loaded = self._swapper.load(image, slot)
            except BaseException:
                self._manager.release(slot, ())
                raise
            if loaded:
                sequence.slot, sequence.num_computed = slot, image.num_tokens
                return 0
            self._manager.release(slot, ())
            _free_image(sequence)
            placement = self._take(sequence, token_ids)
        sequence.slot, sequence.num_computed = placement.slot, placement.num_cached_tokens
        sequence.num_promised = len(token_ids)
        return placement.num_cached_tokens

    def _take(self, sequence: Sequence, token_ids: list[int]) -> Placement:
        request = sequence.request
        return self._manager.take(
            token_ids, salt=request.cache_salt, max_tokens=len(request.prompt_token_ids) + request.max_tokens
        )

    def _chunk_length(self, sequence: Sequence, wanted: int) -> int:
        return min(wanted, self._max_logit_rows) if _reports_prompt(sequence) else wanted

    def _provide(self, sequence: Sequence, count: int) -> bool:
        """Get memory for the sequence's next tokens; False where it is short."""
        assert sequence.slot is not None
        try:
            self._manager.ensure(sequence.slot, sequence.num_computed, sequence.num_computed + count)
        except OutOfMemoryError:
            return False
        return True

    def _fork(self, parent: Sequence, child: Sequence) -> bool:
        """Get a slot for a child that shares its parent's tokens; False where there is none, or no memory."""
        assert parent.slot is not None
        try:
            child.slot = self._manager.fork(parent.slot, parent.num_computed)
        except OutOfMemoryError:
            return False
        child.num_computed = parent.num_computed
        self.running.append(child)
        return True

    def _put(self, sequence: Sequence, count: int, plan: Plan) -> None:
        assert sequence.slot is not None
        start, end = sequence.num_computed, sequence.num_computed + count
        last = end == sequence.num_tokens
        num_logits = count if _reports_prompt(sequence) else int(last)
        plan.chunks.append(Chunk(sequence.slot, start, sequence.token_ids(start, end), num_logits))
        plan.sequences.append(sequence)
        plan.num_tokens += count

    def _preempt(self, unit: list[Sequence], plan: Plan) -> None:
        """Take a unit's memory and let it wait. Alone it fails: it would only come back to the same end."""
        alone = len(unit) == len(self.running)
        for sequence in unit:
            assert sequence.slot is not None
            # Beams fork again when they come back, from tokens that only one of them needs to compute.
            keep = not alone and sequence.request.beams is None
            image = self._swapper.save(sequence.slot, sequence.num_computed) if keep else None
            self.running.remove(sequence)
            self._release(sequence)
            sequence.image = image
        beams = unit[0].request.beams
        first = unit[0] if beams is None else beams.restart()
        if alone:
            plan.failed.append((first, self._too_large(first)))
        else:
            plan.preempted += unit
            self.add(first)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self._manager.release(sequence.slot, sequence.token_ids(0, sequence.num_computed))
        sequence.slot, sequence.num_computed, sequence.num_promised = None, 0, 0

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


def _priority(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.priority


def _free_image(sequence: Sequence) -> None:
    image, sequence.image = sequence.image, None
    if image is not None:
        image.free()


def _reports_prompt(sequence: Sequence) -> bool:
    """Whether logits of prompt tokens are still to be reported."""
    request = sequence.request
    return (
        request.params.prompt_logprobs is not None
        and sequence.index == 0
        and len(request.prompt_logprobs or ()) < len(request.prompt_token_ids)
    )
