"""A trace through the real engine, scheduler and manager, over a device that computes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from vattention.bench.memory.ahead import Ahead
from vattention.bench.memory.device import VOCAB_SIZE, SimulatedDevice
from vattention.bench.memory.meter import Meter
from vattention.bench.memory.pages import Lengths
from vattention.bench.memory.scenarios import Scenario
from vattention.bench.memory.shapes import kv_nbytes
from vattention.bench.memory.trace import Trace
from vattention.bench.memory.variants import NOTHING_CACHED, Variant
from vattention.config import EngineConfig
from vattention.core import TokensPrompt
from vattention.engine.engine import LLMEngine
from vattention.engine.parts import Parts
from vattention.engine.request import Request
from vattention.kv.build import create_manager
from vattention.sampling_params import SamplingParams

if TYPE_CHECKING:
    from vattention.model.runner import ModelRunner

READ_EVERY = 16
"""Steps between two readings of the accounts, which cost as much as a step."""

UNREAD = 0.25
"""Share of the requests that begin before the first reading, and that end after the last."""


@dataclass(frozen=True, slots=True)
class Usage:
    """How a manager used its memory in a scenario.

    Averages are over simulated time, from when the first quarter of the requests has begun until three quarters are
    done; shares are quotients of such averages.

    Attributes:
        live_share, held_share, limit_share, saved_share, mean_batch, mean_waiting, max_batch: see `Meter`.
        num_preemptions: how often a sequence lost its slot, in the whole run.
        num_steps: forwards in the whole run.
        elapsed_s: real time of the simulation.
    """

    scenario: str
    variant: str
    live_share: float
    held_share: float
    limit_share: float
    saved_share: float
    mean_batch: float
    mean_waiting: float
    max_batch: int
    num_preemptions: int
    num_steps: int
    elapsed_s: float


@contextmanager
def simulated_engine(
    scenario: Scenario, variant: Variant, device: SimulatedDevice
) -> Iterator[tuple[LLMEngine, Ahead]]:
    """An engine with the variant's manager, for the scenario's model and memory, on the null driver."""
    model = scenario.model
    config = EngineConfig(
        model=model.name,
        max_num_seqs=scenario.max_num_seqs,
        kv_memory=kv_nbytes(model, scenario.device),
        **{**NOTHING_CACHED, **variant.options},
    )
    manager = Ahead(create_manager(config, model.specs, dtype=torch.bfloat16, device="meta", max_len=model.max_len))
    parts = Parts(
        name=model.name,
        manager=manager.as_manager,
        runner=cast("ModelRunner", device),  # the two methods an engine calls
        tokenizer=None,
        vocab_size=VOCAB_SIZE,
        max_model_len=model.max_len,
        end_token_ids=frozenset(),
        default_sampling={},
    )
    with closing(LLMEngine(config, parts)) as engine:
        yield engine, manager


def simulate(scenario: Scenario, variant: Variant, *, seed: int, n: int = 1, scale: float = 1.0) -> Usage:
    """Run a scenario until most of its requests are done.

    Args:
        n: samples per request, each of the drawn output length; requests then come n times as seldom.
        scale: of the number of requests.
    """
    device = SimulatedDevice(scenario.model, scenario.device)
    started = time.perf_counter()
    with simulated_engine(scenario, variant, device) as (engine, manager):
        run = Run(engine, device, scenario.trace(seed, scale=scale, n=n), n)
        meter = Meter()
        for seconds in run.readings():
            now = engine.statistics()
            meter.add(
                now.accounts,
                seconds,
                held_nbytes=manager.held_nbytes(),
                num_batched=len(device.lengths),
                num_waiting=now.num_waiting,
            )
    return Usage(
        scenario=scenario.name,
        variant=variant.name,
        live_share=meter.live_share,
        held_share=meter.held_share,
        limit_share=meter.limit_share,
        saved_share=meter.saved_share,
        mean_batch=meter.mean_batch,
        mean_waiting=meter.mean_waiting,
        max_batch=meter.max_batch,
        num_preemptions=sum(request.metrics.num_preemptions for request in run.requests),
        num_steps=run.num_steps,
        elapsed_s=time.perf_counter() - started,
    )


def running_lengths(scenario: Scenario, variant: Variant, *, seed: int, scale: float = 1.0) -> Lengths:
    """Which lengths a scenario's sequences have while they run."""
    device = SimulatedDevice(scenario.model, scenario.device)
    with simulated_engine(scenario, variant, device) as (engine, _):
        run = Run(engine, device, scenario.trace(seed, scale=scale), 1)
        return Lengths.of([device.lengths for _ in run.readings()])


class Run:
    """A trace on its way through an engine.

    Attributes:
        requests: those that came so far.
        num_steps: forwards so far.
    """

    def __init__(self, engine: LLMEngine, device: SimulatedDevice, trace: Trace, n: int) -> None:
        self._engine = engine
        self._device = device
        self._trace = trace
        self._n = n
        self.requests: list[Request] = []
        self.num_steps = 0
        self._num_done = 0

    def readings(self) -> Iterator[float]:
        """Step until most requests are done; yields every few steps with the seconds between.

        The first are not read, for the cache fills, nor the last, for it empties and nobody waits any more.
        """
        device, count = self._device, len(self._trace)
        while self._num_begun() < count * UNREAD:
            self._step()
        read_s = device.now_s
        while self._num_done < count * (1 - UNREAD):
            self._step()
            if self.num_steps % READ_EVERY == 0:
                yield device.now_s - read_s
                read_s = device.now_s
        yield device.now_s - read_s

    def _num_begun(self) -> int:
        return sum(request.metrics.first_scheduled_time is not None for request in self.requests)

    def _step(self) -> None:
        """One forward, and the arrivals before it."""
        arrivals, device = self._trace.arrivals_s, self._device
        if not self._engine.has_unfinished_requests():
            device.now_s = max(device.now_s, float(arrivals[len(self.requests)]))
        while len(self.requests) < len(arrivals) and arrivals[len(self.requests)] <= device.now_s:
            self._submit()
        for output in self._engine.step():
            if output.error is not None:
                raise output.error
            self._num_done += output.finished
        self.num_steps += 1

    def _submit(self) -> None:
        """Queue the next request: its prompt is token 0 throughout, as all are, under a salt of its own, so that it
        shares with no other; samples, if there are several, draw tokens of their own.
        """
        index = len(self.requests)
        params = SamplingParams(
            n=self._n,
            temperature=1 if self._n > 1 else 0,
            ignore_eos=True,
            max_tokens=int(self._trace.outputs[index]),
        )
        prompt: TokensPrompt = {
            "prompt_token_ids": [0] * int(self._trace.prompts[index]),
            "cache_salt": str(index),
        }
        self.requests.append(self._engine.prepare(str(index), prompt, params))
        self._engine.start(self.requests[-1])
