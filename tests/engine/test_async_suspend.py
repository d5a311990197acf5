"""Conversations that leave an engine on its thread and come back, and what becomes of their streams."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.fakes import SteppedRunner, completion, fake_engine
from tests.engine.test_async_engine import greedy, tokens, until
from vattention.engine.async_engine import AsyncEngine
from vattention.engine.stream import RequestStream
from vattention.errors import EngineStoppedError, QueueFullError, RequestError
from vattention.sampling_params import SamplingParams

pytest.importorskip("pytest_asyncio")

PROMPT = [5, 6, 7, 8, 9]
COUNT = 12


@pytest.fixture
def runner() -> SteppedRunner:
    return SteppedRunner()


@pytest.fixture
def engine(runner: SteppedRunner) -> Iterator[AsyncEngine]:
    made = AsyncEngine(fake_engine(runner=runner))
    yield made
    runner.run_free()
    made.shutdown()


def lengths(outputs: list[Any]) -> list[int]:
    return [len(output.outputs[0].token_ids) for output in outputs]


async def rest(stream: RequestStream) -> list[int]:
    """The tokens of the stream's last output, which must be a finished one."""
    outputs = [output async for output in stream]
    assert outputs[-1].finished
    tokens: list[int] = outputs[-1].outputs[0].token_ids
    return tokens


async def started(engine: AsyncEngine, runner: SteppedRunner, num_tokens: int) -> RequestStream:
    """A request in the middle of a step, of which so many tokens have been read."""
    stream = engine.submit(tokens(*PROMPT), greedy(COUNT), request_id="a")
    runner.steps.release(num_tokens)
    while lengths([await anext(stream)]) != [num_tokens]:
        pass
    await until(lambda: runner.num_begun > num_tokens)
    return stream


async def begun(order: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """An order that the engine's thread will find when its present step ends."""
    task = asyncio.create_task(order)
    await asyncio.sleep(0)
    return task


async def suspended(engine: AsyncEngine, runner: SteppedRunner, path: Path) -> RequestStream:
    """A request that was suspended with 4 tokens, of which 3 were read."""
    stream = await started(engine, runner, 3)
    suspending = await begun(engine.suspend("a", path))
    runner.steps.release()
    await suspending
    return stream


@pytest.fixture
async def file(tmp_path: Path) -> Path:
    """Of a request that has 4 tokens of 12."""
    runner = SteppedRunner()
    engine = AsyncEngine(fake_engine(runner=runner))
    await suspended(engine, runner, tmp_path / "file")
    engine.shutdown()
    return tmp_path / "file"


async def test_a_suspended_request_goes_on_in_another_engine(
    engine: AsyncEngine, runner: SteppedRunner, tmp_path: Path
) -> None:
    stream = await suspended(engine, runner, tmp_path / "a")
    outputs = [output async for output in stream]
    assert lengths(outputs) == [4], "the newest output is still read"
    assert not outputs[-1].finished
    assert [output async for output in stream] == []
    assert engine.statistics().num_running == engine.statistics().num_waiting == 0
    assert engine.statistics().accounts.live_nbytes == 0

    other = SteppedRunner()
    target = AsyncEngine(fake_engine(runner=other))
    resumed = await target.resume(tmp_path / "a")
    assert lengths([await anext(resumed)]) == [4], "as it was suspended"
    other.run_free()
    assert await rest(resumed) == completion(PROMPT, COUNT)
    assert other.num_computed == COUNT - 4, "nothing is computed twice"
    target.shutdown()


async def test_a_request_that_waits_can_be_suspended_and_comes_back_under_its_id(
    engine: AsyncEngine, runner: SteppedRunner, tmp_path: Path
) -> None:
    stream = engine.submit(tokens(*PROMPT), greedy(COUNT), request_id="a")
    suspending = await begun(engine.suspend("a", tmp_path / "a"))
    runner.run_free()
    await suspending
    resumed = await engine.resume(tmp_path / "a", request_id="a")
    await stream.aclose()  # whoever read the suspended stream has nothing to do with the resumed one
    assert await rest(resumed) == completion(PROMPT, COUNT)


async def test_unknown_requests_and_beam_searches_are_refused(
    engine: AsyncEngine, runner: SteppedRunner, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="no request 'a' is running"):
        await engine.suspend("a", tmp_path / "a")
    beams = SamplingParams(use_beam_search=True, beam_width=2, max_tokens=3)
    stream = engine.submit(tokens(*PROMPT), beams, request_id="b")
    suspending = await begun(engine.suspend("b", tmp_path / "b"))
    runner.run_free()
    with pytest.raises(RequestError, match="beam search cannot be suspended"):
        await suspending
    assert len(await rest(stream)) == 3
    assert list(tmp_path.iterdir()) == []


async def test_a_request_that_cannot_be_written_runs_on(
    engine: AsyncEngine, runner: SteppedRunner, tmp_path: Path
) -> None:
    stream = await started(engine, runner, 3)
    suspending = await begun(engine.suspend("a", tmp_path / "gone" / "a"))
    runner.run_free()
    with pytest.raises(FileNotFoundError):
        await suspending
    assert await rest(stream) == completion(PROMPT, COUNT)


async def test_what_cannot_be_resumed_leaves_nothing(
    file: Path, engine: AsyncEngine, runner: SteppedRunner
) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(RequestError, match="damaged"):
        await engine.resume(file, request_id="a")
    with pytest.raises(FileNotFoundError):
        await engine.resume(file.parent / "nothing", request_id="a")
    assert not engine._streams
    runner.run_free()
    assert await rest(engine.submit(tokens(3), greedy(5), request_id="a")) == completion([3], 5)
    assert engine.statistics().accounts.live_nbytes == 0


async def test_an_id_in_use_and_a_full_queue_refuse_a_file(file: Path) -> None:
    runner = SteppedRunner()
    engine = AsyncEngine(fake_engine(num_slots=1, max_queue=1, runner=runner))
    first = await engine.resume(file, request_id="a")
    with pytest.raises(ValueError, match="'a' is in use"):
        await engine.resume(file, request_id="a")
    second = engine.submit(tokens(3), greedy(5))
    with pytest.raises(QueueFullError, match="max_queue=1"):
        await engine.resume(file)
    runner.run_free()
    assert await rest(first) == completion(PROMPT, COUNT)
    assert await rest(second) == completion([3], 5)
    engine.shutdown()


async def test_a_draining_engine_lets_requests_leave_and_takes_none_back(
    engine: AsyncEngine, runner: SteppedRunner, tmp_path: Path
) -> None:
    stream = await started(engine, runner, 3)
    draining = await begun(engine.drain(600))
    suspending = await begun(engine.suspend("a", tmp_path / "a"))
    runner.steps.release()
    await suspending
    await draining
    assert lengths([output async for output in stream]) == [4]
    with pytest.raises(EngineStoppedError, match="takes no more requests"):
        await engine.resume(tmp_path / "a")


async def test_a_stopped_engine_says_so(file: Path, engine: AsyncEngine, runner: SteppedRunner) -> None:
    await started(engine, runner, 1)
    orders = [await begun(engine.suspend("a", file.parent / "a")), await begun(engine.resume(file))]
    stopping = asyncio.create_task(asyncio.to_thread(engine.shutdown))
    await until(lambda: engine._stopping)
    runner.run_free()
    await stopping
    for refused in orders:
        with pytest.raises(EngineStoppedError, match="has been shut down"):
            await asyncio.wait_for(refused, 60)
    with pytest.raises(EngineStoppedError, match="has been shut down"):
        await engine.suspend("a", file.parent / "a")
    with pytest.raises(EngineStoppedError):
        await engine.resume(file)
    assert [path.name for path in file.parent.iterdir()] == ["file"]


async def test_a_dead_engine_says_why(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = fake_engine()
    engine = AsyncEngine(inner)

    def broken() -> Any:
        raise RuntimeError("the scheduler broke")

    monkeypatch.setattr(inner, "step", broken)
    with pytest.raises(EngineStoppedError):
        await rest(await engine.resume(file))
    for refused in (engine.suspend("a", file.parent / "a"), engine.resume(file)):
        with pytest.raises(EngineStoppedError, match="died") as death:
            await refused
        assert "the scheduler broke" in str(death.value.__cause__)
    engine.shutdown()


@pytest.mark.parametrize("is_reading", [False, True])
async def test_whoever_gives_up_resuming_leaves_nothing(
    is_reading: bool, file: Path, engine: AsyncEngine, runner: SteppedRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its turn, or while the engine's thread is reading."""
    reading, go_on = threading.Event(), threading.Event()
    resume = engine._engine.resume

    def slow(*arguments: Any) -> Any:
        reading.set()
        assert go_on.wait(60)
        return resume(*arguments)

    monkeypatch.setattr(engine._engine, "resume", slow)
    busy = engine.submit(tokens(3), greedy(5))
    resuming = await begun(engine.resume(file, request_id="a"))
    if is_reading:
        runner.run_free()
        assert await asyncio.to_thread(reading.wait, 60)
    resuming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await resuming
    go_on.set()
    runner.run_free()
    assert await rest(busy) == completion([3], 5)
    assert await rest(engine.submit(tokens(4), greedy(5), request_id="a")) == completion([4], 5)
    assert not engine._streams
    assert engine.statistics().num_running == engine.statistics().num_waiting == 0


async def test_a_finished_conversation_is_there_at_once(
    engine: AsyncEngine, runner: SteppedRunner, tmp_path: Path
) -> None:
    runner.run_free()
    stream = engine.submit(tokens(*PROMPT), greedy(COUNT))
    outputs = [output async for output in stream]
    await engine.suspend_finished(outputs[-1], tmp_path / "a")
    resumed = await engine.resume(tmp_path / "a")
    again = [output async for output in resumed]
    assert [output.outputs for output in again] == [outputs[-1].outputs]
    assert not engine._streams
