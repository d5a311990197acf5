from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.fakes import SteppedRunner, completion, fake_engine
from vattention.engine.async_engine import AsyncEngine
from vattention.errors import ContextLengthError, EngineStoppedError, QueueFullError
from vattention.sampling_params import SamplingParams

pytest.importorskip("pytest_asyncio")


@pytest.fixture
def engine() -> Iterator[AsyncEngine]:
    made = AsyncEngine(fake_engine())
    yield made
    made.shutdown()


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens)


def tokens(*ids: int) -> Any:
    return {"prompt_token_ids": list(ids)}


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what must come to be, on however busy a machine."""
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.005)


async def last_tokens(engine: AsyncEngine, prompt: list[int], count: int) -> list[int]:
    async for output in engine.generate(tokens(*prompt), greedy(count)):
        latest = output
    return latest.outputs[0].token_ids


async def test_many_requests_at_once_get_their_own_tokens(engine: AsyncEngine) -> None:
    prompts = [[2 + i, 3 + i % 7] for i in range(30)]
    results = await asyncio.gather(*(last_tokens(engine, prompt, 10) for prompt in prompts))
    assert results == [completion(prompt, 10) for prompt in prompts]


async def test_outputs_are_cumulative_and_end_once(engine: AsyncEngine) -> None:
    lengths = [len(output.outputs[0].token_ids) async for output in engine.generate(tokens(5), greedy(20))]
    assert lengths == sorted(lengths)
    assert lengths[-1] == 20


async def test_invalid_requests_are_refused_before_they_start(engine: AsyncEngine) -> None:
    with pytest.raises(ContextLengthError):
        engine.submit(tokens(*[5] * 64), greedy(1))


async def test_leaving_early_frees_the_memory(engine: AsyncEngine) -> None:
    stream = engine.submit(tokens(*[5] * 20), greedy(44))
    await anext(stream)
    await stream.aclose()
    await until(lambda: engine.statistics().num_running == 0)
    assert engine.statistics().accounts.live_nbytes == 0


async def test_a_reader_that_stops_reading_holds_no_memory(engine: AsyncEngine) -> None:
    stream = engine.submit(tokens(*[5] * 20), greedy(40))
    await anext(stream)
    await until(lambda: not engine._streams)
    await until(lambda: engine.statistics().accounts.live_nbytes == 0)
    [kept] = [output async for output in stream]
    assert kept.finished
    assert kept.outputs[0].token_ids == completion([5] * 20, 40)


async def test_an_abort_from_elsewhere_ends_the_stream() -> None:
    runner = SteppedRunner()
    engine = AsyncEngine(fake_engine(runner=runner))
    stream = engine.submit(tokens(*[5] * 4), greedy(20))
    runner.steps.release(1)
    assert not (await anext(stream)).finished
    engine.abort(stream.request_id)
    runner.run_free()
    assert not any([output.finished async for output in stream])
    assert [output async for output in stream] == []
    engine.shutdown()


async def test_a_third_hangs_up_at_random_and_nothing_stays(engine: AsyncEngine) -> None:
    rng = random.Random(0)

    async def client(index: int) -> None:
        prompt = [2 + index % 40] * rng.randint(1, 30)
        if index % 3:
            assert await last_tokens(engine, prompt, 20) == completion(prompt, 20)
            return
        task = asyncio.create_task(last_tokens(engine, prompt, 30))
        await asyncio.sleep(rng.random() * 0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    await asyncio.gather(*(client(i) for i in range(100)))
    await until(lambda: not engine._engine.has_unfinished_requests() and not engine._orders)
    assert engine.statistics().num_running == engine.statistics().num_waiting == 0
    assert not engine._streams
    assert engine.statistics().accounts.live_nbytes == 0


async def test_a_full_queue_refuses_with_a_time_to_retry() -> None:
    runner = SteppedRunner()
    engine = AsyncEngine(fake_engine(num_slots=1, max_queue=2, runner=runner))
    try:
        streams = [engine.submit(tokens(5), greedy(1)) for _ in range(3)]
        with pytest.raises(QueueFullError, match="max_queue=2") as refusal:
            engine.submit(tokens(5), greedy(1))
        assert refusal.value.retry_after_s >= 1.0
        runner.run_free()
        for stream in streams:
            assert [output.finished async for output in stream][-1]
    finally:
        runner.run_free()
        engine.shutdown()


async def test_drain_lets_running_requests_finish_and_refuses_new_ones(engine: AsyncEngine) -> None:
    running = asyncio.create_task(last_tokens(engine, [5], 40))
    await asyncio.sleep(0)
    await engine.drain(10.0)
    with pytest.raises(EngineStoppedError, match="shutting down"):
        engine.submit(tokens(5), greedy(1))
    assert await running == completion([5], 40)


async def test_shutdown_ends_streams_with_an_error() -> None:
    runner = SteppedRunner()
    engine = AsyncEngine(fake_engine(runner=runner))
    stream = engine.submit(tokens(5), greedy(40))
    stopping = asyncio.create_task(asyncio.to_thread(engine.shutdown))
    await until(lambda: engine._stopping)
    runner.run_free()
    await stopping
    with pytest.raises(EngineStoppedError, match="stopped before"):
        async for _ in stream:
            pass
    engine.shutdown()


async def test_a_dead_engine_says_why_to_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = fake_engine()

    def broken() -> Any:
        raise RuntimeError("the scheduler broke")

    engine = AsyncEngine(inner)
    monkeypatch.setattr(inner, "step", broken)
    with pytest.raises(EngineStoppedError) as death:
        await last_tokens(engine, [5], 3)
    assert "the scheduler broke" in str(death.value.__cause__)
    assert not engine.healthy
    with pytest.raises(EngineStoppedError, match="died"):
        engine.submit(tokens(5), greedy(1))
    engine.shutdown()


async def test_an_idle_engine_uses_no_processor(engine: AsyncEngine) -> None:
    """Of the thread's own time and wake-ups, so that the rest of the process may do what it will."""
    await last_tokens(engine, [5], 3)
    await until(lambda: not engine._engine.has_unfinished_requests())
    thread = engine._thread
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)

    def num_wakeups() -> int:
        status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
        return int(re.findall(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.MULTILINE)[0])

    await asyncio.sleep(0.1)  # the last step's end
    before, slept = time.clock_gettime(clock), num_wakeups()
    await asyncio.sleep(0.4)
    assert time.clock_gettime(clock) - before < 0.01
    assert num_wakeups() - slept <= 3


async def test_warm_memory_goes_back_when_nothing_comes(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vattention.engine.async_engine.IDLE_KEEP_S", 0.05)
    monkeypatch.setattr("vattention.engine.async_engine.IDLE_KEEP_CACHED_S", 0.05)
    await last_tokens(engine, [5], 3)
    await until(lambda: engine.statistics().accounts.mapped_nbytes == 0)
    assert await last_tokens(engine, [5], 3) == completion([5], 3)


async def test_an_idle_engine_keeps_no_memory_that_others_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vattention.engine.async_engine.IDLE_LOOK_S", 0.05)
    inner = fake_engine()
    engine = AsyncEngine(inner)
    try:
        await last_tokens(engine, [5], 3)
        assert engine.statistics().accounts.warm_nbytes > 0
        monkeypatch.setattr(inner.manager, "refresh_limit", lambda: inner.manager.set_limit(0))
        await until(lambda: engine.statistics().accounts.mapped_nbytes == 0)
    finally:
        engine.shutdown()


async def test_in_a_forked_process_nothing_waits_for_a_thread_that_is_not_there(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as forked:
        forked.setattr(engine._thread, "is_alive", lambda: False)
        assert not engine.healthy
        with pytest.raises(EngineStoppedError, match="'spawn'"):
            engine.submit(tokens(5), greedy(2))
        with pytest.raises(EngineStoppedError):
            await engine.suspend("any", "file")
    assert engine.healthy
