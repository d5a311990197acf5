"""Decode steps as CUDA graphs: hundreds of short kernels for the price of one launch.

A graph is captured once for each number of sequences, over addresses that never change. That is where contiguous
slots in virtual memory pay: a sequence that grows, or whose pages change hands, stays where it is, so nothing is
captured again and no block table is rebuilt. Memory goes on being mapped behind the slots while a graph runs.

A batch is filled up to the next number that there is a graph for with rows that write to a slot of their own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from vattention.attention.fixed_batch import fixed_batch
from vattention.attention.kernel import RaggedBatch
from vattention.core import Chunk
from vattention.errors import OutOfMemoryError
from vattention.kv.manager import KVManager
from vattention.model.cuda_graphs import Capture, Replay

_log = logging.getLogger(__name__)

_MOST_SEQUENCES = 512
"""Larger batches keep a GPU busy for longer than their launches take."""

_FIRST_MOST_KEYS = 2048
_MOST_KEYS_STEP = 8
"""Kernels cut keys into parts by the longest sequence there may be, which is decided when a graph is captured: for
up to 2,048 tokens there is another graph than for up to 16,384 and so on, lest a short sequence be one part."""

Forward = Callable[[torch.Tensor, RaggedBatch], torch.Tensor]
"""Token ids [B] of a batch, to logits [B, V] in the model's type."""


@dataclass(frozen=True, slots=True)
class CaptureReport:
    """What capturing graphs took: `num_graphs` of them, time and the device's memory."""

    num_graphs: int
    elapsed_s: float
    nbytes: int


class DecodeGraphs:
    """Replays decode steps, and captures what they replay.

    Args:
        forward: an eager forward pass.
        capture: makes graphs of it.
        kv: of which a slot is taken for rows that fill a batch up.
        windows: of the model's layers.
        width: logits of a row.

    Raises:
        OutOfMemoryError: the cache has no slot to spare, or no memory behind its first token, or none for a longest
            sequence beside it.
        torch.OutOfMemoryError: the device has no memory for inputs and logits.
    """

    def __init__(
        self,
        forward: Forward,
        capture: Capture,
        kv: KVManager,
        windows: Iterable[int | None],
        *,
        width: int,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._capture = capture
        self._windows = frozenset(windows)
        self._sizes = batch_sizes(min(kv.num_free_slots - 1, _MOST_SEQUENCES))
        self._bounds = key_bounds(kv.max_len)
        if not self._sizes:
            raise OutOfMemoryError(2, kv.num_free_slots, "CUDA graphs need a slot beside the sequences' own")
        self._kv = kv
        most = self._sizes[-1]
        self._inputs = torch.zeros(most, 3, dtype=torch.int64, device=device)
        """Of each row the token, its slot and its position."""
        self._logits = torch.zeros(most, width, dtype=torch.float32, device=device)
        self._replays: dict[tuple[int, int], Replay] = {}
        self._gave_up = False
        # Last, since it is not given back if something above fails.
        self._scratch = _scratch_slot(kv)

    def warm_up(self) -> CaptureReport:
        """Capture graphs for short sequences: the largest batch first, whose memory the others use again."""
        begin, before = time.perf_counter(), self._capture.in_use_nbytes
        for size in reversed(self._sizes):
            self._replay(size, self._bounds[0])
        nbytes = max(self._capture.in_use_nbytes - before, 0)
        report = CaptureReport(len(self._replays), time.perf_counter() - begin, nbytes)
        _log.info(
            "CUDA graphs: %d, for decode steps of up to %d sequences, in %.1f s and %.0f MiB",
            report.num_graphs,
            self._sizes[-1],
            report.elapsed_s,
            report.nbytes / 2**20,
        )
        return report

    def logits(self, chunks: Sequence[Chunk]) -> torch.Tensor | None:
        """[len(chunks), V] float32, to be read until the next call; the chunks' keys and values are stored.

        None, and nothing done, where not every sequence brings one token, or there is no graph for such a batch.
        """
        if not chunks or len(chunks) > self._sizes[-1] or any(len(chunk.token_ids) != 1 for chunk in chunks):
            return None
        size = next(size for size in self._sizes if size >= len(chunks))
        most_keys = max(chunk.end for chunk in chunks)
        replay = self._replay(size, next(bound for bound in self._bounds if bound >= most_keys))
        if replay is None:
            return None
        self._fill(size, [(chunk.token_ids[0], chunk.slot, chunk.start) for chunk in chunks])
        replay()
        return self._logits[: len(chunks)]

    def close(self) -> None:
        """Give the slot back. Calling it again does nothing."""
        self._replays.clear()
        if self._sizes:
            self._sizes = ()
            self._kv.release(self._scratch)

    def _replay(self, size: int, most_keys: int) -> Replay | None:
        """The graph for `size` sequences of up to `most_keys` tokens, captured if need be and possible."""
        found = self._replays.get((size, most_keys))
        if found is not None or self._gave_up:
            return found
        self._fill(size, [])
        begin = time.perf_counter()
        try:
            with torch.inference_mode():
                replay = self._capture(lambda: self._step(size, most_keys))
        except Exception as error:
            self._gave_up = True
            # What ends a capture hides what went wrong in it.
            reason = error.__context__ or error
            _log.warning(
                "no CUDA graph for a decode step of %d sequences of up to %d tokens: %s; such steps are launched "
                "kernel by kernel, which takes longer. If memory is short, lower kv_memory or max_num_seqs; "
                "enforce_eager=True leaves graphs out",
                size,
                most_keys,
                reason,
                exc_info=error,
            )
            return None
        _log.debug(
            "captured a step of %d sequences of up to %d tokens in %.2f s",
            size,
            most_keys,
            time.perf_counter() - begin,
        )
        self._replays[size, most_keys] = replay
        return replay

    def _step(self, size: int, most_keys: int) -> None:
        """What is captured: it reads the inputs, the cache and the weights, and writes the cache and the logits."""
        token_ids, slots, positions = self._inputs[:size].unbind(1)
        batch = fixed_batch(slots, positions, most_keys, self._windows)
        self._logits[:size].copy_(self._forward(token_ids, batch))

    def _fill(self, size: int, rows: Sequence[tuple[int, int, int]]) -> None:
        padding = [(0, self._scratch, 0)] * (size - len(rows))
        here = torch.tensor([*rows, *padding], dtype=torch.int64)
        on_cpu = self._inputs.device.type == "cpu"
        self._inputs[:size].copy_(here if on_cpu else here.pin_memory(), non_blocking=not on_cpu)


def _scratch_slot(kv: KVManager) -> int:
    """A slot whose first token has memory for good."""
    fits = kv.fits(kv.max_len)
    slot = kv.take((), max_tokens=1).slot
    try:
        kv.ensure(slot, 0, 1)
        if fits and not kv.has_room(kv.max_len):
            accounts = kv.accounts()
            raise OutOfMemoryError(
                accounts.limit_nbytes + 1,
                accounts.limit_nbytes,
                f"CUDA graphs need memory that a sequence of {kv.max_len:,} tokens would lack; raise kv_memory, or "
                "lower max_model_len",
            )
    except BaseException:
        kv.release(slot)
        raise
    return slot


def batch_sizes(most: int) -> tuple[int, ...]:
    """Numbers of sequences that there are graphs for: 1, 2, 4, 8 and so on by 8, beyond 256 by 32; and `most`."""
    every = (1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 32))
    return tuple(sorted({size for size in every if size < most} | ({most} if most > 0 else set())))


def key_bounds(max_len: int) -> tuple[int, ...]:
    """Most tokens of a sequence that there are graphs for, up to `max_len`."""
    bounds = []
    bound = _FIRST_MOST_KEYS
    while bound < max_len:
        bounds.append(bound)
        bound *= _MOST_KEYS_STEP
    return (*bounds, max_len)
