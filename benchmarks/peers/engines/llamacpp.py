"""llama.cpp, driven as its server drives it: slots, continuous batching, chunks of prompts beside decoding slots.

The server itself is not in the package; what it does with tokens is this loop around `llama_decode`. Tokens are
chosen from the logits with numpy, which is quicker than llama.cpp's own sampler over a large vocabulary.
"""

from __future__ import annotations

import argparse
import bisect
import ctypes
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.engines.driver import Load, Sample, drive, num_threads, num_wanted
from vattention.bench.workload import BenchRequest

KV_TYPES = {"f16": 1, "q8_0": 8, "bf16": 30}
"""Numbers of ggml's types; the package does not name all of them."""
BATCH_TOKENS = 2048
SLOT_MULTIPLE = 256
"""llama.cpp rounds the length of a slot up to this many tokens."""


@dataclass(slots=True)
class Slot:
    """One sequence of llama.cpp's KV cache, while a sample is in it.

    Attributes:
        waiting: tokens not computed yet.
        position: of the first of them.
        forks: slots and samples that go on from the same prompt.
    """

    number: int
    request: BenchRequest
    sample: Sample
    waiting: list[int]
    position: int = 0
    forks: list[tuple[int, Sample]] = field(default_factory=list)

    @property
    def decoding(self) -> bool:
        return bool(self.sample.token_ids)

    @property
    def done(self) -> bool:
        return len(self.sample.token_ids) == num_wanted(self.request)


class LlamaCpp:
    packages = ("llama-cpp-python",)

    def __init__(self, model: str, slots: int, kv_type: str, share_prefix: bool) -> None:
        self.settings: dict[str, Any] = {"kv_unified": False, "flash_attn": True, "share_prefix": share_prefix}
        self._most_slots = slots
        self._kv_type = kv_type
        self._share_prefix = share_prefix
        self._rng = np.random.default_rng(0)
        self._context: Any = None
        self._memory: Any = None
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        self._num_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def prepare(self, load: Load) -> None:
        """A context of as many slots of such a length as the work wants."""
        # Requests of one shape are a batch that is to run as one; among others, more slots than this cost more than
        # they bring on a few cores.
        self._slots = load.num_sequences if load.uniform else min(load.num_sequences, self._most_slots)
        self.settings["slots"] = self._slots
        self._prefix_slot = self._slots if self._share_prefix else None
        sequences = self._slots + self._share_prefix
        per_slot = -(-(load.longest + 1) // SLOT_MULTIPLE) * SLOT_MULTIPLE
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = sequences
        params.n_ctx = sequences * per_slot
        params.n_batch = BATCH_TOKENS
        # Otherwise room is made for the logits of a whole batch.
        params.n_outputs_max = sequences
        params.n_threads = params.n_threads_batch = num_threads()
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k = params.type_v = KV_TYPES[self._kv_type]
        params.kv_unified = False
        params.swa_full = False
        self._free_context()
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {sequences} sequences of {per_slot} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)

    def complete(self, requests: Sequence[BenchRequest]) -> list[list[Sample]]:
        outputs = [[Sample() for _ in range(request.params.n)] for request in requests]
        queue = deque(zip(requests, outputs, strict=True))
        # The lowest are taken first: sequences are computed together only where their numbers follow each other.
        free = list(range(self._slots))
        running: list[Slot] = []
        num_shared = self._compute_prefix(requests)
        while queue or running:
            while queue and queue[0][0].params.n <= len(free):
                running.append(self._admit(*queue.popleft(), free, num_shared))
            self._step(running)
            for slot in [slot for slot in running if slot.done]:
                running.remove(slot)
                bisect.insort(free, slot.number)
                llama_cpp.llama_memory_seq_rm(self._memory, slot.number, -1, -1)
            if not running and queue and queue[0][0].params.n > len(free):
                raise ValueError(f"a request wants {queue[0][0].params.n} samples, but there are {len(free)} slots")
        return outputs

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        self._free_context()
        llama_cpp.llama_model_free(self._model)

    def _free_context(self) -> None:
        if self._context:
            llama_cpp.llama_free(self._context)
            self._context = None

    def _admit(self, request: BenchRequest, samples: list[Sample], free: list[int], num_shared: int) -> Slot:
        number = free.pop(0)
        if num_shared:
            llama_cpp.llama_memory_seq_cp(self._memory, self._prefix_slot, number, -1, -1)
        slot = Slot(number, request, samples[0], list(request.prompt_token_ids[num_shared:]), num_shared)
        slot.forks = [(free.pop(0), sample) for sample in samples[1:]]
        return slot

    def _compute_prefix(self, requests: Sequence[BenchRequest]) -> int:
        """Compute once what all prompts begin with; how many tokens that is."""
        if self._prefix_slot is None or len(requests) < 2:
            return 0
        columns = zip(*(request.prompt_token_ids[:-1] for request in requests), strict=False)
        prefix = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
        llama_cpp.llama_memory_seq_rm(self._memory, self._prefix_slot, -1, -1)
        for begin in range(0, len(prefix), BATCH_TOKENS):
            self._batch.n_tokens = 0
            for offset, token in enumerate(prefix[begin : begin + BATCH_TOKENS]):
                self._put(token, begin + offset, self._prefix_slot, wanted=False)
            self._decode()
        return len(prefix)

    def _step(self, running: list[Slot]) -> None:
        """One batch: a token of every decoding slot, then as much of the prompts as fits."""
        self._batch.n_tokens = 0
        ready: list[tuple[Slot, int]] = []
        for slot in sorted(running, key=lambda slot: (not slot.decoding, slot.number)):
            chunk = slot.waiting[: BATCH_TOKENS - self._batch.n_tokens]
            if not chunk:
                continue
            del slot.waiting[: len(chunk)]
            for index, token in enumerate(chunk):
                wanted = not slot.waiting and index == len(chunk) - 1
                self._put(token, slot.position + index, slot.number, wanted)
            slot.position += len(chunk)
            if not slot.waiting:
                ready.append((slot, self._batch.n_tokens - 1))
        self._decode()
        drawn = [(slot, self._draw(slot, row)) for slot, row in ready]
        now = time.perf_counter()
        for slot, tokens in drawn:
            for (number, sample), token in zip(slot.forks, tokens[1:], strict=True):
                llama_cpp.llama_memory_seq_cp(self._memory, slot.number, number, -1, -1)
                sample.extend([token], now)
                running.append(Slot(number, slot.request, sample, [token], slot.position))
            slot.forks = []
            slot.sample.extend(tokens[:1], now)
            slot.waiting = tokens[:1]

    def _put(self, token: int, position: int, number: int, wanted: bool) -> None:
        batch, row = self._batch, self._batch.n_tokens
        batch.token[row] = token
        batch.pos[row] = position
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = number
        batch.logits[row] = wanted
        batch.n_tokens = row + 1

    def _decode(self) -> None:
        code = llama_cpp.llama_decode(self._context, self._batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code} for {self._batch.n_tokens} tokens")

    def _draw(self, slot: Slot, row: int) -> list[int]:
        """A token for the slot, and for each of its forks."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, row)
        logits: NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape=(self._num_vocab,))
        count = 1 + len(slot.forks)
        params = slot.request.params
        if params.greedy:
            return [int(logits.argmax())] * count
        scaled = (logits - logits.max()) / params.temperature
        cumulated = np.cumsum(np.exp(scaled, out=scaled), out=scaled)
        draws = self._rng.random(count, dtype=np.float32) * cumulated[-1]
        return [int(token) for token in np.searchsorted(cumulated, draws)]


def build(arguments: argparse.Namespace) -> LlamaCpp:
    return LlamaCpp(arguments.model, arguments.slots, arguments.kv_type, arguments.share_prefix)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="Measure llama.cpp.")
    options.add_argument("--slots", type=int, default=16, help="for requests of different lengths")
    options.add_argument("--kv-type", default="f16", choices=sorted(KV_TYPES))
    options.add_argument("--share-prefix", action="store_true", help="compute what all prompts begin with once")
    drive(build, options)
