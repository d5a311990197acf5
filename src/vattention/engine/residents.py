"""The running sequences: those that have a slot, how they come by it, and how they lose it."""

from __future__ import annotations

from vattention.engine.preemption import Swapper
from vattention.engine.sequence import Sequence
from vattention.errors import OutOfMemoryError
from vattention.kv.manager import KVManager, Placement


class Residents:
    """Gives slots to sequences and takes them back.

    Args:
        manager: whose slots they are.
        swapper: keeps what sequences have computed that lose theirs.
        max_num_seqs: most that have one; a manager may have more, for CUDA graphs.

    Attributes:
        running: in no particular order.

    Raises (all methods that ask the manager for memory):
        DriverError: the system refuses; the sequence is as it was.
    """

    def __init__(self, manager: KVManager, swapper: Swapper, max_num_seqs: int) -> None:
        self._manager = manager
        self._swapper = swapper
        self._max_num_seqs = max_num_seqs
        self.running: list[Sequence] = []

    def units(self) -> list[list[Sequence]]:
        """What is preempted together: single sequences, and all beams of a request, by priority."""
        units: dict[object, list[Sequence]] = {}
        for sequence in sorted(self.running, key=_priority):
            units.setdefault(sequence.request.beams or sequence, []).append(sequence)
        return list(units.values())

    def awaits(self, sequence: Sequence) -> bool:
        """Whether a running sequence is computing what this one could have from the cache soon."""
        tokens = sequence.token_ids(0, sequence.num_tokens)
        return self._manager.awaits(tokens, salt=sequence.request.cache_salt)

    def has_room(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence fits beside those that run, with the slots that beams will need."""
        groups = {running.request.beams for running in self.running} - {None}
        num_held = sum(running.request.beams is not None for running in self.running)
        num_spoken_for = sum(beams.width for beams in groups if beams is not None) - num_held
        num_needed = 1 if sequence.request.beams is None else sequence.request.beams.width
        # An image goes into a slot of its own, which shares nothing.
        token_ids = sequence.wanted_token_ids if sequence.image is None else []
        return self._num_free_slots >= num_spoken_for + num_needed and self._manager.has_room(
            sequence.num_tokens + 1, token_ids, salt=sequence.request.cache_salt
        )

    def admit(self, sequence: Sequence) -> int | None:
        """Give a waiting sequence a slot that holds what its image has, or what the prefix cache has of its tokens.

        Returns:
            How many tokens the cache gave; None where slots or memory are short.
        """
        try:
            num_cached = self._place(sequence, sequence.wanted_token_ids)
        except OutOfMemoryError:
            return None
        self.running.append(sequence)
        return num_cached

    def provide(self, sequence: Sequence, count: int) -> bool:
        """Get memory for the sequence's next tokens; False where it is short."""
        assert sequence.slot is not None
        try:
            self._manager.ensure(sequence.slot, sequence.num_computed, sequence.num_computed + count)
        except OutOfMemoryError:
            return False
        return True

    def computed(self, sequence: Sequence, start: int, end: int) -> None:
        """Tokens [start, end) are in its slot, where others may share them."""
        assert sequence.slot is not None
        sequence.num_computed = end
        if start < sequence.num_promised:
            self._manager.computed(sequence.slot, min(end, sequence.num_promised))

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Get a slot for a child that shares its parent's tokens; False where there is none, or no memory."""
        assert parent.slot is not None
        if self._num_free_slots < 1:
            return False
        try:
            child.slot = self._manager.fork(parent.slot, parent.num_computed)
        except OutOfMemoryError:
            return False
        child.num_computed = parent.num_computed
        self.running.append(child)
        return True

    def hand_over(self, parent: Sequence, child: Sequence) -> None:
        """Let `child` run on in `parent`'s slot, in its place."""
        self.running[self.running.index(parent)] = child
        child.slot, child.num_computed, child.num_promised = parent.slot, parent.num_computed, parent.num_promised
        parent.slot, parent.num_computed, parent.num_promised = None, 0, 0

    def leave(self, sequence: Sequence, *, keep: bool = False) -> None:
        """Take a sequence's slot.

        Args:
            keep: the sequence comes back: keep an image of what it has computed, if that pays.
        """
        assert sequence.slot is not None
        image = self._swapper.save(sequence.slot, sequence.num_computed) if keep else None
        self.running.remove(sequence)
        self._manager.release(sequence.slot, sequence.token_ids(0, sequence.num_computed))
        sequence.slot, sequence.num_computed, sequence.num_promised = None, 0, 0
        if image is not None:
            sequence.image = image

    @property
    def _num_free_slots(self) -> int:
        return min(self._manager.num_free_slots, self._max_num_seqs - len(self.running))

    def _place(self, sequence: Sequence, token_ids: list[int]) -> int:
        """Give a sequence a slot, and say how many of `token_ids`, its first ones, the cache gave."""
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
            sequence.free_image()
            placement = self._take(sequence, token_ids)
        sequence.slot, sequence.num_computed = placement.slot, placement.num_cached_tokens
        sequence.num_promised = len(token_ids)
        return placement.num_cached_tokens

    def _take(self, sequence: Sequence, token_ids: list[int]) -> Placement:
        request = sequence.request
        return self._manager.take(
            token_ids, salt=request.cache_salt, max_tokens=len(request.prompt_token_ids) + request.max_tokens
        )


def _priority(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.priority
