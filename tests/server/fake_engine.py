"""An engine that says what it is told to, on the event loop, with a tokenizer of bytes and made-up memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from vattention.config import EngineConfig
from vattention.core import Prompt
from vattention.engine.stats import EngineStatistics, FinishedStats, StatsListener, StepStats
from vattention.errors import ContextLengthError, EngineStoppedError, QueueFullError, RequestError
from vattention.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from vattention.sampling_params import SamplingParams

BOS, EOS, VOCAB = 256, 257, 258
TOKEN_NBYTES = 1024
STORY = "Once upon a time a page was mapped, and nobody noticed. "


class ByteTokenizer:
    """One token per byte of UTF-8, and two special ones."""

    vocab_size = VOCAB
    has_chat_template = False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text = "".join(chr(0xE000 + t) if t >= BOS else chr(t) for t in token_ids)
        pieces: list[str] = []
        held = bytearray()
        for char in text:
            if ord(char) < BOS:
                held.append(ord(char))
                continue
            pieces.append(held.decode(errors="replace"))
            held.clear()
            if not skip_special_tokens:
                pieces.append({BOS: "<bos>", EOS: "<eos>"}[ord(char) - 0xE000])
        return "".join(pieces) + held.decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        if any(message["content"] == "refuse me" for message in messages):
            raise RequestError("the chat template refuses this conversation", param="messages")
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        if continue_final_message:
            text = text.removesuffix("\n")
        if add_generation_prompt:
            text += "assistant: "
        text = f"{template or ''}{text}{''.join(f'{k}={v};' for k, v in variables.items())}"
        return [BOS, *text.encode()]

    def chat_template_source(self, template: str | None = None, *, with_tools: bool = False) -> str:
        return template or "{{ messages }}"

    def chat_stop_strings(self, template: str | None = None) -> tuple[str, ...]:
        return () if template else ("\nuser:",)


@dataclass(eq=False)
class FakeStream:
    """One request on its way, and the iterator over its outputs."""

    engine: FakeEngine
    request_id: str
    prompt: list[int]
    params: SamplingParams
    priority: int
    wanted: list[list[int]]
    metrics: RequestMetrics
    news: asyncio.Event = field(default_factory=asyncio.Event)
    latest: RequestOutput | None = None
    failure: Exception | None = None
    over: bool = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.over:
            raise StopAsyncIteration
        await self.news.wait()
        self.news.clear()
        if self.failure is not None:
            self.over = True
            raise self.failure
        assert self.latest is not None
        self.over = self.latest.finished
        return self.latest

    async def aclose(self) -> None:
        self.over = True
        self.engine.aborted += self.engine.running.pop(self.request_id, None) is not None

    def output(self, done: int, error: Exception | None = None) -> RequestOutput:
        samples = [self.sample(index, wanted, done, error) for index, wanted in enumerate(self.wanted)]
        count = self.params.prompt_logprobs
        return RequestOutput(
            request_id=self.request_id,
            prompt=None,
            prompt_token_ids=self.prompt,
            outputs=samples,
            finished=all(sample.finished() for sample in samples),
            prompt_logprobs=None if count is None else [None, *(logprobs(t, count) for t in self.prompt[1:])],
            metrics=self.metrics,
            error=error,
        )

    def sample(self, index: int, wanted: list[int], done: int, error: Exception | None) -> CompletionOutput:
        tokens = wanted[:done]
        tokenizer = self.engine.tokenizer or ByteTokenizer()
        text = tokenizer.decode(tokens, self.params.skip_special_tokens).rstrip("\ufffd")
        reason: str | None = None
        stop_reason: str | int | None = None
        for stop in self.params.stop_strings:
            if stop in text:
                text, reason, stop_reason = text[: text.index(stop)], "stop", stop
        if reason is None and done >= len(wanted):
            reason = "stop" if wanted[-1] == EOS else "length"
        if reason is None and self.params.stop_strings:
            text = text[: max(0, len(text) - max(len(stop) for stop in self.params.stop_strings) + 1)]
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=tokens,
            logprobs=None
            if self.params.logprobs is None
            else [logprobs(token, self.params.logprobs) for token in tokens],
            finish_reason="error" if error else reason,
            stop_reason=stop_reason,
        )


def logprobs(token: int, count: int) -> TokenLogprobs:
    """The token at -0.5, and below it its successors; the last at minus infinity."""
    others = {(token + 1 + i) % BOS: Logprob(-1.0 - i, 2 + i) for i in range(count - 1)}
    if count > 2:
        others[(token + count - 1) % BOS] = Logprob(float("-inf"), count)
    return {token: Logprob(-0.5, 1), **others}


class FakeEngine:
    """Continues every prompt with STORY.

    A prompt's text may contain orders: "say(...)" is answered with what is in the brackets and then ends, and
    "fail(n)" fails after n tokens with `error`.

    Attributes:
        step_s: pause between tokens.
        gate: while it is not set, nothing moves.
        aborted: requests given up by their clients.
    """

    model_name = "fake"
    max_model_len = 512

    def __init__(
        self, *, step_s: float = 0.0, max_queue: int = 1000, tokens_per_step: int = 1, text: bool = True
    ) -> None:
        self.config = EngineConfig(model="fake-folder", max_queue=max_queue)
        self.tokenizer: ByteTokenizer | None = ByteTokenizer() if text else None
        self.default_sampling: Mapping[str, Any] = {}
        self.healthy = True
        self.step_s = step_s
        self.tokens_per_step = tokens_per_step
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception = RuntimeError("injected")
        self.running: dict[str, FakeStream] = {}
        self.submitted: list[FakeStream] = []
        self.aborted = 0
        self._listeners: list[StatsListener] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def make_ready(self, params: SamplingParams) -> None:
        """It has nothing to read."""

    def submit(self, prompt: Prompt, params: SamplingParams, *, priority: int = 0) -> FakeStream:
        if not self.healthy:
            raise EngineStoppedError("the engine is shutting down and takes no more requests")
        assert isinstance(prompt, dict)
        token_ids = list(prompt["prompt_token_ids"])  # type: ignore[typeddict-item]
        if any(token >= VOCAB for token in token_ids):
            raise RequestError("no such token", param="prompt")
        room = self.max_model_len - len(token_ids)
        if room < 1:
            raise ContextLengthError(f"the prompt has {len(token_ids)} tokens, too many")
        if len(self.running) >= self.config.max_queue:
            raise QueueFullError("too many requests wait", retry_after_s=1.2)
        text = ByteTokenizer().decode(token_ids)
        said = _order(text, "say")
        wanted = [*said.encode(), EOS] if said is not None else _forever(STORY)
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        stream = FakeStream(
            engine=self,
            request_id=f"request-{len(self.submitted)}",
            prompt=token_ids,
            params=params,
            priority=priority,
            wanted=[[*_first(wanted, index, limit)] for index in range(params.n)],
            metrics=RequestMetrics(arrival_time=time.monotonic()),
        )
        self.running[stream.request_id] = stream
        self.submitted.append(stream)
        task = asyncio.get_running_loop().create_task(self._run(stream, _order(text, "fail")))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    async def _run(self, stream: FakeStream, fail_at: str | None) -> None:
        done = 0
        stream.metrics.first_scheduled_time = time.monotonic()
        while stream.request_id in self.running:
            await self.gate.wait()
            await asyncio.sleep(self.step_s)
            if stream.request_id not in self.running:
                break
            before, done = done, done + self.tokens_per_step
            failed = fail_at is not None and done > int(fail_at)
            stream.latest = stream.output(before if failed else done, self.error if failed else None)
            stream.news.set()
            now = time.monotonic()
            if before == 0:
                stream.metrics.first_token_time = now
            self._report_step(stream, done)
            if stream.latest.finished:
                stream.metrics.finished_time = now
                del self.running[stream.request_id]
        reason = None if stream.latest is None else stream.latest.outputs[0].finish_reason
        self._report_finished(stream, reason or "abort")

    def _report_step(self, stream: FakeStream, done: int) -> None:
        first = done == self.tokens_per_step
        for listener in self._listeners:
            listener.on_step(
                StepStats(
                    num_prompt_tokens=len(stream.prompt) if first else 0,
                    num_looked_up_tokens=len(stream.prompt) if first else 0,
                    num_cached_tokens=0,
                    num_generated_tokens=self.tokens_per_step,
                    num_preemptions=0,
                    duration_s=self.step_s,
                    num_running=len(self.running),
                    num_waiting=0,
                    times_to_first_token_s=[0.003] if first else [],
                    inter_token_latencies_s=[] if first else [0.02],
                )
            )

    def _report_finished(self, stream: FakeStream, reason: str) -> None:
        counts = [0] if stream.latest is None else [len(sample.token_ids) for sample in stream.latest.outputs]
        for listener in self._listeners:
            listener.on_finished(
                FinishedStats(
                    finish_reason=reason,
                    num_prompt_tokens=len(stream.prompt),
                    num_generated_tokens=sum(counts),
                    num_longest_tokens=max(counts),
                    num_cached_tokens=0,
                    metrics=stream.metrics,
                    num_sequences=stream.params.n,
                    n=stream.params.n,
                    max_tokens=stream.params.max_tokens,
                )
            )

    def statistics(self) -> EngineStatistics:
        from vattention.kv.manager import Accounts  # only now: it loads torch, which takes seconds

        live = TOKEN_NBYTES * sum(len(stream.prompt) for stream in list(self.running.values()))
        return EngineStatistics(
            num_running=len(self.running),
            num_waiting=0,
            num_slots=128,
            accounts=Accounts(2**40, 2**20, live + 4096, live, live, 4096, 0),
        )

    def add_listener(self, listener: StatsListener) -> None:
        self._listeners.append(listener)

    async def drain(self, timeout_s: float) -> None:
        self.healthy = False
        deadline = time.monotonic() + timeout_s
        while self.running and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    def shutdown(self) -> None:
        self.healthy = False
        for stream in list(self.running.values()):
            stream.failure = EngineStoppedError("the engine stopped before the request ended")
            loop = stream.news._loop  # type: ignore[attr-defined]
            loop.call_soon_threadsafe(stream.news.set)
        self.running.clear()


def _order(text: str, verb: str) -> str | None:
    _, found, rest = text.rpartition(f"{verb}(")
    return rest.partition(")")[0] if found else None


def _forever(text: str) -> Iterator[int] | list[int]:
    return list(text.encode()) * 20


def _first(tokens: Any, index: int, limit: int) -> list[int]:
    """A sample's tokens; every sample but the first begins one token later."""
    return list(tokens)[index : index + limit]


EngineFactory = Callable[[], FakeEngine]
