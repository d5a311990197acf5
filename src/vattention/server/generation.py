"""From engine streams to what a client gets: several requests at once, cumulative outputs cut into deltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from vattention.core import TokensPrompt
from vattention.errors import EngineStoppedError
from vattention.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from vattention.sampling_params import SamplingParams
from vattention.server.engine import OutputStream, ServedEngine
from vattention.server.protocol import FinishReason, Usage


@asynccontextmanager
async def outputs_of(
    engine: ServedEngine,
    prompts: Iterable[Sequence[int]],
    params: SamplingParams,
    *,
    priority: int,
    cache_salt: str,
) -> AsyncIterator[AsyncIterator[tuple[int, RequestOutput]]]:
    """Submit prompts and iterate over (prompt's index, newest output); on leaving, what still runs is aborted.

    Raises:
        RequestError, QueueFullError, EngineStoppedError: from the engine; none of the prompts runs then.
        Exception: in the iteration, whatever a request failed of.
    """
    await engine.make_ready(params)
    streams: list[OutputStream] = []
    try:
        for token_ids in prompts:
            prompt: TokensPrompt = {"prompt_token_ids": token_ids, "cache_salt": cache_salt}
            streams.append(engine.submit(prompt, params, priority=priority))
        yield _checked(streams)
    finally:
        for stream in streams:
            await stream.aclose()


async def _checked(streams: Sequence[OutputStream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    async for index, output in _merged(streams):
        if output.error is not None:
            raise output.error
        if any(sample.finish_reason == "abort" for sample in output.outputs):
            raise EngineStoppedError("the request was aborted before it ended")
        yield index, output


async def _merged(streams: Sequence[OutputStream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return

    async def following(index: int) -> RequestOutput:
        return await anext(streams[index])

    waiting = {asyncio.ensure_future(following(index)): index for index in range(len(streams))}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting[task]
                try:
                    output = task.result()
                finally:
                    del waiting[task]
                if not output.finished:
                    waiting[asyncio.ensure_future(following(index))] = index
                yield index, output
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class SampleDelta:
    """What is new of one sample; `logprobs` is None unless asked for."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None


@dataclass(slots=True)
class Cursor:
    """How much of one sample has been passed on."""

    num_chars: int = 0
    num_tokens: int = 0
    finished: bool = False

    def advance(self, sample: CompletionOutput) -> SampleDelta:
        """What came since the last call."""
        news = SampleDelta(
            text=sample.text[self.num_chars :],
            token_ids=sample.token_ids[self.num_tokens :],
            logprobs=None if sample.logprobs is None else sample.logprobs[self.num_tokens :],
            finish_reason=finish_reason(sample),
            stop_reason=sample.stop_reason,
        )
        self.num_chars, self.num_tokens = len(sample.text), len(sample.token_ids)
        self.finished = news.finish_reason is not None
        return news


def finish_reason(sample: CompletionOutput) -> FinishReason | None:
    """In OpenAI's words; errors and aborts never get here."""
    match sample.finish_reason:
        case None:
            return None
        case "length":
            return "length"
        case _:
            return "stop"


def usage(outputs: Iterable[RequestOutput]) -> Usage:
    """Tokens of all prompts and their samples."""
    outputs = list(outputs)
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_completion = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }
