"""A cache that takes what a GPU has free, beside others that take memory: a whole engine over a fake of CUDA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from tests.engine.fakes import SPECS, FakeRunner, completion, fake_engine
from tests.memory.fake_cuda import GRANULARITY, FakeCuda, FakeTorch
from vattention.core import Chunk
from vattention.engine import engine as engines
from vattention.engine.engine import LLMEngine
from vattention.kv.layout import plan
from vattention.kv.virtual import VirtualManager
from vattention.memory.cuda import CudaDriver
from vattention.sampling_params import SamplingParams

NUM_PAGES = 40
RESERVED_NBYTES = NUM_PAGES * GRANULARITY // 20
PAGES_PER_SEQUENCE = 4
NUM_TOKENS = 20


class Gpu:
    """An engine of ten slots over a fake GPU whose memory the processor can read."""

    def __init__(self, runner: FakeRunner | None = None) -> None:
        self.fake = FakeCuda(NUM_PAGES * GRANULARITY)
        driver = CudaDriver(api=self.fake, torch_side=FakeTorch())
        driver._capabilities = replace(driver.capabilities, device="cpu")
        layout = plan(SPECS, item_nbytes=4, num_slots=20, max_len=64, page_nbytes=driver.page_nbytes, sliced=False)
        self.manager = VirtualManager(
            driver,
            layout,
            dtype=torch.float32,
            limit_nbytes=None,
            num_slots=10,
            prefix_cache=True,
            background=False,
        )
        self.engine: LLMEngine = fake_engine(manager=self.manager, num_slots=10, runner=runner)
        self.outputs: dict[str, list[int]] = {}

    @property
    def limit_nbytes(self) -> int:
        return self.manager.accounts().limit_nbytes

    def take(self, num_pages: int) -> None:
        """By another process."""
        self.fake.taken_nbytes = num_pages * GRANULARITY

    def add(self, count: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
        for index in range(count):
            self.engine.add_request(str(index), {"prompt_token_ids": prompt(index)}, params)

    def step(self) -> None:
        for output in self.engine.step():
            assert output.error is None
            self.outputs[output.request_id] = output.outputs[0].token_ids
        assert self.fake.used_nbytes + self.fake.taken_nbytes <= self.fake.total_nbytes

    def finish(self) -> None:
        while self.engine.has_unfinished_requests():
            self.step()
        assert self.outputs == {name: completion(prompt(int(name)), NUM_TOKENS) for name in self.outputs}


def prompt(index: int) -> list[int]:
    return [2 + index] * (3 + index)


@pytest.fixture(autouse=True)
def _limits_are_read_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "LIMIT_REFRESH_S", 0.0)


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    gpu = Gpu()
    yield gpu
    gpu.engine.close()
    assert gpu.fake.used_nbytes == 0
    assert not gpu.fake.ranges


def test_the_cache_takes_what_graphs_leave(gpu: Gpu) -> None:
    assert gpu.limit_nbytes == NUM_PAGES * GRANULARITY - RESERVED_NBYTES
    gpu.take(5)  # graphs' memory is not the driver's either
    gpu.manager.refresh_limit()
    assert gpu.limit_nbytes == (NUM_PAGES - 5) * GRANULARITY - RESERVED_NBYTES


def test_running_sequences_make_room_for_others_and_come_back(gpu: Gpu) -> None:
    gpu.add(9)
    for _ in range(6):
        gpu.step()
    assert len(gpu.engine._scheduler.running) == 9
    gpu.take(40 - 9 * PAGES_PER_SEQUENCE)  # all that is free, the reserve among it
    gpu.step()
    gpu.step()
    free = gpu.fake.total_nbytes - gpu.fake.used_nbytes - gpu.fake.taken_nbytes
    assert free >= RESERVED_NBYTES  # sequences were preempted until the reserve was free again
    assert len(gpu.engine._scheduler.running) < 9
    gpu.take(0)
    for _ in range(4):
        gpu.step()
    assert gpu.limit_nbytes == NUM_PAGES * GRANULARITY - RESERVED_NBYTES
    gpu.finish()
    assert len(gpu.outputs) == 9


def test_memory_that_others_took_before_the_limit_fell_queues(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "LIMIT_REFRESH_S", 1e9)
    gpu.add(2)
    for _ in range(3):
        gpu.step()
    gpu.take(NUM_PAGES - 3 * PAGES_PER_SEQUENCE)
    before = gpu.limit_nbytes
    gpu.engine.add_request(
        "2", {"prompt_token_ids": prompt(2)}, SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    )
    gpu.engine.add_request(
        "3", {"prompt_token_ids": prompt(3)}, SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    )
    gpu.finish()
    assert gpu.limit_nbytes == before
    assert len(gpu.outputs) == 4


class Short(FakeRunner):
    """A forward pass finds no memory for its activations, as often as it is told."""

    num_failures = 0

    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        if self.num_failures:
            self.num_failures -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(chunks)


def test_a_forward_pass_without_memory_gets_the_caches() -> None:
    runner = Short()
    gpu = Gpu(runner)
    gpu.add(3)
    gpu.finish()
    assert gpu.manager.accounts().warm_nbytes > 0
    gpu.outputs.clear()
    gpu.add(1)
    runner.num_failures = 1
    gpu.step()
    assert gpu.fake.used_nbytes == PAGES_PER_SEQUENCE * GRANULARITY  # nothing warm is left
    gpu.finish()
    gpu.add(1)
    runner.num_failures = 2
    (output,) = gpu.engine.step()
    assert isinstance(output.error, torch.OutOfMemoryError)
    gpu.engine.close()
