"""What becomes of the keys and values of a sequence that loses its slot: kept elsewhere, or computed again.

Swapping costs its bytes over the copies' bandwidth, out and back in; recomputing costs its tokens over the rate at
which prompts are computed. PagedAttention (arXiv 2309.06180, sections 4.5 and 7.3) names both and leaves the choice
to the operator; here it is made per sequence, from what this machine was seen to do. Beams are always computed
again: copies of their slots would hold what they share as often as there are beams.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence

from vattention.core import Chunk
from vattention.errors import DriverError, OutOfMemoryError
from vattention.kv.manager import KVManager
from vattention.kv.swap import Image, SwapSpace

logger = logging.getLogger(__name__)

_DECAY = 0.9
"""What one more measurement leaves of the weight of those before it."""

_RETRY_EVERY = 16
"""After so many sequences in a row that were not swapped because copying was slow, one is, to measure it again."""


class Rate:
    """Amounts per second, as a moving average in which each measurement counts by how much it moved."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._seconds = 0.0

    def measured(self, amount: int, seconds: float) -> None:
        self._amount = self._amount * _DECAY + amount
        self._seconds = self._seconds * _DECAY + seconds

    def seconds(self, amount: int, unknown: float = 0.0) -> float:
        """How long `amount` will take; `unknown` before the first measurement."""
        return amount * self._seconds / self._amount if self._amount else unknown


class SwapPolicy:
    """Whether to swap a sequence, learned from what swapping and computing cost so far.

    Copies that were never measured count as free of cost: so the first sequence is swapped, and measures them. The
    cost of recomputing is that of all tokens: what a prefix cache will still have of them by then is not known.

    Attributes:
        prefill: tokens per second of forward passes over prompts.
        copy_out, copy_in: bytes per second.
    """

    def __init__(self) -> None:
        self.prefill = Rate()
        self.copy_out = Rate()
        self.copy_in = Rate()
        self._num_refused = 0

    def swaps(self, nbytes: int, num_tokens: int) -> bool:
        """Whether keeping `nbytes` is expected to take less time than computing `num_tokens` again."""
        recompute_s = self.prefill.seconds(num_tokens, math.inf)
        cheaper = self.copy_out.seconds(nbytes) + self.copy_in.seconds(nbytes) <= recompute_s
        self._num_refused = 0 if cheaper or self._num_refused == _RETRY_EVERY else self._num_refused + 1
        return self._num_refused == 0

    def loads(self, nbytes: int, num_tokens: int) -> bool:
        """Whether copying an image back is expected to take less time than the tokens it saves."""
        return num_tokens > 0 and self.copy_in.seconds(nbytes) <= self.prefill.seconds(num_tokens, math.inf)


class Swapper:
    """Moves keys and values between slots and a swap space. What goes wrong there only costs computing again.

    Args:
        space: None to keep nothing.
    """

    def __init__(self, manager: KVManager, space: SwapSpace | None, policy: SwapPolicy | None = None) -> None:
        self._manager = manager
        self._space = space
        self._policy = policy or SwapPolicy()

    @property
    def num_images(self) -> int:
        """Sequences whose keys and values are kept now."""
        return self._space.num_images if self._space is not None else 0

    @property
    def used_nbytes(self) -> int:
        return self._space.used_nbytes if self._space is not None else 0

    @property
    def capacity_nbytes(self) -> int:
        return self._space.capacity_nbytes if self._space is not None else 0

    def forwarded(self, chunks: Sequence[Chunk], seconds: float) -> None:
        """Learn from a forward pass what computing tokens costs. One that decodes only says nothing about that."""
        if any(len(chunk.token_ids) > 1 for chunk in chunks):
            self._policy.prefill.measured(sum(len(chunk.token_ids) for chunk in chunks), seconds)

    def save(self, slot: int, num_tokens: int) -> Image | None:
        """Keep the slot's first tokens; None where they are better computed again, or cannot be kept."""
        if self._space is None or num_tokens == 0:
            return None
        runs = self._manager.runs(slot, num_tokens)
        if not self._policy.swaps(sum(run.nbytes for run in runs), num_tokens):
            return None
        begun, image = time.monotonic(), None
        try:
            image = self._space.save(runs, num_tokens)
        except OutOfMemoryError as error:
            logger.debug("not swapped: %s", error)
        except DriverError:
            logger.exception("a sequence could not be swapped; it will be computed again")
        # What failed brought nothing and took its time all the same.
        self._policy.copy_out.measured(image.nbytes if image is not None else 0, time.monotonic() - begun)
        return image

    def pays(self, image: Image, num_cached_tokens: int) -> bool:
        """Whether loading an image is expected to be quicker than computing what the prefix cache lacks of it."""
        return self._policy.loads(image.nbytes, image.num_tokens - num_cached_tokens)

    def load(self, image: Image, slot: int) -> bool:
        """Copy an image into a slot, as `Image.load`; False if it cannot be read."""
        begun = time.monotonic()
        try:
            image.load(self._manager, slot)
        except DriverError:
            logger.exception("a swapped sequence could not be read back; it is computed again")
            return False
        self._policy.copy_in.measured(image.nbytes, time.monotonic() - begun)
        return True

    def close(self) -> None:
        """Free what is kept."""
        if self._space is not None:
            self._space.close()
