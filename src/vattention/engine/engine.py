"""The engine: requests in, outputs out, one forward pass a step. Single-threaded; `AsyncEngine` gives it a thread.

A step::

    schedule ─► (map ahead) ─► forward ─► sample ─► advance
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vattention.config import EngineConfig
from vattention.core import Prompt
from vattention.engine.draws import Draws, sample
from vattention.engine.forward import Forward
from vattention.engine.intake import Intake
from vattention.engine.parts import Parts
from vattention.engine.plan import Plan
from vattention.engine.preemption import Swapper
from vattention.engine.request import Request
from vattention.engine.requests import Requests
from vattention.engine.scheduler import Scheduler
from vattention.engine.sequence import Sequence
from vattention.engine.stats import EngineStatistics, Stats, StatsListener
from vattention.engine.suspend import Suspender
from vattention.errors import EngineStoppedError, RequestError
from vattention.kv.manager import KVManager
from vattention.model.tokenizer import Tokenizer
from vattention.outputs import RequestOutput
from vattention.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

LIMIT_REFRESH_S = 1.0
"""How often the memory limit follows what the machine can spare."""

MAX_LOGITS_NUMBERS = 2**26
"""Most logits held at once for prompt logprobs; longer chunks are cut."""


class LLMEngine:
    """Serves requests on one model. Build it with `from_config`, or from ready parts."""

    def __init__(self, config: EngineConfig, parts: Parts) -> None:
        self.config = config
        self._parts = parts
        self._intake = Intake(config, parts)
        self._swapper = Swapper(parts.manager, parts.swap_space)
        self._forward = Forward(parts.runner, parts.manager, self._swapper)
        self._scheduler = Scheduler(
            parts.manager,
            self._swapper,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_logit_rows=max(1, MAX_LOGITS_NUMBERS // parts.vocab_size),
        )
        self._suspender = Suspender(parts, self._intake)
        self._stats = Stats()
        self._requests = Requests(self._scheduler, self._stats)
        self._limit_read_at = time.monotonic()
        self._process = os.getpid()
        self._closed = False

    @classmethod
    def from_config(cls, config: EngineConfig) -> LLMEngine:
        """Load the model, reserve the cache, and verify that the model computes the same through it.

        Raises:
            ConfigError, UnsupportedModelError, OutOfMemoryError: as their messages say.
        """
        from vattention.engine.build import build  # the model library takes seconds to import

        return cls(config, build(config))

    @property
    def manager(self) -> KVManager:
        return self._parts.manager

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._parts.tokenizer

    @property
    def model_name(self) -> str:
        return self._parts.name

    @property
    def max_model_len(self) -> int:
        return self._parts.max_model_len

    @property
    def default_sampling(self) -> Mapping[str, Any]:
        """Sampling parameters that the model's makers recommend."""
        return self._parts.default_sampling

    def add_listener(self, listener: StatsListener) -> None:
        """Have `listener` told of every step and every finished request, on the engine's thread."""
        self._stats.listeners.append(listener)

    def to_read(self, params: SamplingParams) -> Callable[[], object] | None:
        """What makes `prepare` take seconds the first time, for any thread to call before; None if nothing does."""
        return self._intake.to_read(params)

    def prepare(self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int = 0) -> Request:
        """Check and tokenize a request without starting it. Any thread may call this.

        Raises:
            RequestError: the request cannot be served as it is.
        """
        return self._intake.request(request_id, prompt, params, priority)

    def start(self, request: Request) -> None:
        """Queue a prepared request: its first sample, from which the others fork once the prompt is computed."""
        self._check_open()
        self._requests.start(request)

    def add_request(self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int = 0) -> None:
        """Check, tokenize and queue a request."""
        self.start(self.prepare(request_id, prompt, params, priority))

    def abort(self, request_id: str) -> None:
        """Stop a request and free its memory at once. An unknown id is no error: it may just have ended."""
        request = self._requests.get(request_id)
        if request is not None:
            self._requests.end([s for s in request.sequences if s.finish_reason is None], "abort")

    def suspend(self, request_id: str, path: str | Path) -> None:
        """Write a running or waiting request to a file and end it here, without another output; `resume` goes on.

        Raises:
            RequestError: no such request runs, or it is a beam search.
            OSError, DriverError: the file cannot be written; the request runs on.
        """
        self._check_open()
        request = self._requests.get(request_id)
        if request is None:
            raise RequestError(f"no request {request_id!r} is running", param="request_id")
        if request.beams is not None:
            raise RequestError("a beam search cannot be suspended: let it end, or abort it", param="request_id")
        self._suspender.write_request(request, path)
        self._requests.forget(request)

    def suspend_finished(self, output: RequestOutput, path: str | Path, cache_salt: str = "") -> None:
        """Write a finished conversation to a file, with what the prefix cache still has of it.

        Raises:
            OSError, DriverError: the file cannot be written.
            OutOfMemoryError: no slot is free to look into the cache.
        """
        self._check_open()
        self._suspender.write_output(output, cache_salt, path)

    def resume(self, path: str | Path, request_id: str, priority: int = 0) -> RequestOutput:
        """Take in a file of `suspend` or `suspend_finished`: a request that was running goes on with the next step.

        Returns:
            The conversation as it was suspended.

        Raises:
            OSError: the file cannot be read.
            RequestError: it is damaged, of another model, or does not fit this engine's context.
            OutOfMemoryError: no slot or no memory is free for what goes into the prefix cache.
        """
        self._check_open()
        taken = self._suspender.read(path, request_id, priority)
        if isinstance(taken, RequestOutput):
            return taken
        if any(sequence.output_token_ids for sequence in taken.sequences):
            self._requests.go_on(taken)
        else:
            self.start(taken)
        return taken.output()

    def has_unfinished_requests(self) -> bool:
        return len(self._requests) > 0

    def step(self) -> list[RequestOutput]:
        """Compute one forward pass and return the requests it moved on."""
        self._check_open()
        started = time.monotonic()
        if started - self._limit_read_at >= LIMIT_REFRESH_S:
            self._limit_read_at = started
            self.manager.refresh_limit()
        plan = self._scheduler.schedule()
        moved = self._fail(plan)
        if plan.chunks:
            self._map_ahead(plan)
            try:
                draws = sample(plan, self._forward(plan))
            except Exception as error:
                logger.exception("a forward pass failed; its %d sequences end with it", len(plan.chunks))
                moved += self._requests.end(plan.sequences, "error", error)
            else:
                moved += self._advance(plan, draws)
        self._stats.step(plan, moved, started, len(self._scheduler.running), self._scheduler.num_waiting)
        return [request.output() for request in dict.fromkeys(s.request for s in moved)]

    def statistics(self) -> EngineStatistics:
        """Queue lengths and memory now. Any thread may call this."""
        return EngineStatistics(
            num_running=len(self._scheduler.running),
            num_waiting=self._scheduler.num_waiting,
            num_slots=min(self.manager.num_slots, self.config.max_num_seqs),
            accounts=self.manager.accounts(),
            num_swapped=self._swapper.num_images,
            swapped_nbytes=self._swapper.used_nbytes,
            swap_space_nbytes=self._swapper.capacity_nbytes,
        )

    def close(self) -> None:
        """Give all memory back; the engine cannot be used any more. In a forked process there is none to give back:
        it is of the one that made the engine.
        """
        if self._closed or os.getpid() != self._process:
            return
        self._closed = True
        self._parts.runner.close()
        self._swapper.close()
        self.manager.close()

    def _check_open(self) -> None:
        if os.getpid() != self._process:
            raise EngineStoppedError(
                f"this engine's memory is that of process {self._process}, from which this one was forked; load "
                "the model in the process that uses it, or start processes with the method 'spawn'"
            )
        if self._closed:
            raise EngineStoppedError("this engine has been closed; make a new one")

    def _map_ahead(self, plan: Plan) -> None:
        """Let the mapper provide for the step after this one: a token, or a prompt's next chunk, per sequence."""
        wants = []
        for chunk, sequence in zip(plan.chunks, plan.sequences, strict=True):
            remaining = sequence.num_tokens - chunk.end
            count = min(max(remaining, 1), self.config.max_num_batched_tokens)
            if chunk.end + count <= self.max_model_len:
                wants.append((chunk.slot, chunk.end, chunk.end + count))
        self.manager.prefetch(wants)

    def _advance(self, plan: Plan, draws: Draws) -> list[Sequence]:
        """Give each sequence its token, let samples fork that waited for it; returns the sequences that moved."""
        now = time.monotonic()
        self._scheduler.advance(plan)
        for parent in plan.sequences:
            if parent.num_computed == parent.num_tokens:
                for child in parent.request.take_unforked():
                    self._scheduler.fork(parent, child)
        for sequence, token in zip(draws.sampling, draws.tokens, strict=True):
            if token.error is not None:
                sequence.finish("error")
                sequence.request.error = token.error
                continue
            metrics = sequence.request.metrics
            if metrics.first_token_time is None:
                metrics.first_token_time = now
            sequence.append(token)
        self._requests.retire([s for s in draws.sampling if s.finish_reason is not None])
        return draws.sampling + self._advance_beams(draws, now)

    def _advance_beams(self, draws: Draws, now: float) -> list[Sequence]:
        """Let searches whose beams have all proposed go on; returns the beams that moved.

        Beams that die give back their slots here; the next step's forks, which need some, come after.
        """
        moved: list[Sequence] = []
        for beam, own in zip(draws.beams, draws.proposals, strict=True):
            request = beam.request
            if request.finished or request.beams is None:
                continue
            if own.error is not None:
                moved += self._requests.end([beam], "error", own.error)
                continue
            request.beams.offer(beam, own)
            if not request.beams.ready:
                continue
            if request.metrics.first_token_time is None:
                request.metrics.first_token_time = now
            dead = dict.fromkeys(request.beams.live)
            for branch in request.beams.advance():
                self._scheduler.hand_over(branch.parent, branch.child)
                del dead[branch.parent]
            request.sequences = request.beams.sequences
            self._requests.retire(dead)
            moved += request.beams.live or request.sequences
        return moved

    def _fail(self, plan: Plan) -> list[Sequence]:
        for sequence, error in plan.failed:
            self._requests.end([sequence], "error", error)
        for sequence in plan.preempted:
            sequence.request.metrics.num_preemptions += 1
        return [sequence for sequence, _ in plan.failed]
