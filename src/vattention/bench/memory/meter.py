"""Averages of a KV cache's accounts over a run."""

from __future__ import annotations

from dataclasses import dataclass

from vattention.kv.manager import Accounts


@dataclass(slots=True)
class Meter:
    """Sums of bytes times seconds; shares are quotients of two of them.

    Attributes:
        token, live, held, limit, unshared: in byte seconds. `held` is all memory mapped for running sequences, what
            is mapped ahead included. `unshared` is what they would need if nothing were shared.
        batched, waiting: in sequence seconds.
        max_batch: most sequences in a forward.
        seconds: measured.
    """

    token: float = 0.0
    live: float = 0.0
    held: float = 0.0
    limit: float = 0.0
    unshared: float = 0.0
    batched: float = 0.0
    waiting: float = 0.0
    seconds: float = 0.0
    max_batch: int = 0

    def add(
        self, accounts: Accounts, seconds: float, *, held_nbytes: int, num_batched: int, num_waiting: int
    ) -> None:
        """Let the accounts stand for `seconds` of the run."""
        self.token += accounts.token_nbytes * seconds
        self.live += accounts.live_nbytes * seconds
        self.held += held_nbytes * seconds
        self.limit += accounts.limit_nbytes * seconds
        self.unshared += (accounts.live_nbytes + accounts.shared_nbytes) * seconds
        self.batched += num_batched * seconds
        self.waiting += num_waiting * seconds
        self.seconds += seconds
        self.max_batch = max(self.max_batch, num_batched)

    @property
    def live_share(self) -> float:
        """Token bytes in live memory."""
        return self.token / self.live if self.live else 0.0

    @property
    def held_share(self) -> float:
        """Token bytes in all memory mapped for running sequences."""
        return self.token / self.held if self.held else 0.0

    @property
    def limit_share(self) -> float:
        """Token bytes in the whole memory for keys and values, used or not."""
        return self.token / self.limit if self.limit else 0.0

    @property
    def saved_share(self) -> float:
        """Memory saved by sharing, of what unshared sequences would need."""
        return 1 - self.live / self.unshared if self.unshared else 0.0

    @property
    def mean_batch(self) -> float:
        return self.batched / self.seconds if self.seconds else 0.0

    @property
    def mean_waiting(self) -> float:
        return self.waiting / self.seconds if self.seconds else 0.0
