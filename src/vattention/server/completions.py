"""/v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from vattention.errors import RequestError
from vattention.outputs import RequestOutput
from vattention.sampling_params import SamplingParams
from vattention.server.generation import Cursor, SampleDelta, outputs_of, usage
from vattention.server.hangup import until_hangup
from vattention.server.logprobs import TokenNames, completion_logprobs, prompt_logprobs
from vattention.server.protocol_completions import (
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
)
from vattention.server.service import Service, response_id
from vattention.server.sse import Events, EventStream


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions")
    async def create_completion(request: Request, body: CompletionRequest) -> Response:
        service.check_model(body.model)
        completion = _Completion(service, body)
        if body.stream:
            return EventStream(completion.events())
        return JSONResponse(await until_hangup(request.receive, completion.response()))

    return router


@dataclass(slots=True)
class _Sample:
    """One choice on its way out. With `echo` it begins with the prompt.

    Attributes:
        offset: characters of its text so far, as logprobs count them.
    """

    cursor: Cursor = field(default_factory=Cursor)
    offset: int = 0
    begun: bool = False


class _Completion:
    """One request: its prompts in, its choices out, whole or in pieces."""

    def __init__(self, service: Service, body: CompletionRequest) -> None:
        self._service = service
        self._body = body
        self._id = response_id("cmpl", body)
        self._created = int(time.time())
        self._names = TokenNames(service.engine.tokenizer, body.return_tokens_as_token_ids)
        self._texts: list[str] = []
        self._samples: dict[int, _Sample] = {}

    async def response(self) -> CompletionResponse:
        latest: dict[int, RequestOutput] = {}
        async with await self._outputs() as outputs:
            async for index, output in outputs:
                latest[index] = output
        ordered = [self._counted(latest[index]) for index in range(len(self._texts))]
        choices = [choice for index, output in enumerate(ordered) for choice in self._choices(index, output)]
        response = self._envelope(choices)
        response["usage"] = usage(ordered)
        return response

    async def events(self) -> Events:
        latest: dict[int, RequestOutput] = {}
        async with await self._outputs() as outputs:
            async for index, output in outputs:
                latest[index] = self._counted(output)
                for choice in self._choices(index, latest[index]):
                    chunk = self._envelope([choice])
                    if self._body.reports_usage:
                        chunk["usage"] = usage(latest.values()) if self._body.reports_usage_always else None
                    yield chunk
        if self._body.reports_usage:
            chunk = self._envelope([])
            chunk["usage"] = usage(latest.values())
            yield chunk

    async def _outputs(self) -> AbstractAsyncContextManager[AsyncIterator[tuple[int, RequestOutput]]]:
        """Check everything, and submit all prompts."""
        body, service = self._body, self._service
        service.check_count(len(body.prompt))
        params = self._params()
        prompts: list[list[int]] = []
        for prompt in body.prompt:
            if isinstance(prompt, str):
                token_ids = await service.encode(prompt, add_special_tokens=body.add_special_tokens)
                text = prompt
            else:
                token_ids = prompt
                text = await self._decode(prompt) if body.echo else ""
            service.check_context(token_ids, body.max_tokens, "max_tokens")
            prompts.append(token_ids)
            self._texts.append(text)
        return outputs_of(service.engine, prompts, params, priority=body.priority, cache_salt=body.cache_salt)

    async def _decode(self, token_ids: list[int]) -> str:
        tokenizer, skip = self._service.tokenizer, self._body.skip_special_tokens
        wrong = next((token for token in token_ids if not 0 <= token < tokenizer.vocab_size), None)
        if wrong is not None:
            raise RequestError(f"{wrong} is not a token id of this model", param="prompt")
        return await self._service.in_worker(lambda: tokenizer.decode(token_ids, skip_special_tokens=skip))

    def _params(self) -> SamplingParams:
        body = self._body
        from_prompt = body.prompt_logprobs
        if from_prompt is None and body.echo:
            from_prompt = body.logprobs
        return self._service.sampling(
            body,
            # An engine generates at least one token; `_counted` takes it away again.
            max_tokens=max(body.max_tokens, 1),
            logprobs=body.logprobs,
            prompt_logprobs=from_prompt,
        )

    def _counted(self, output: RequestOutput) -> RequestOutput:
        """The output without its tokens where the client wanted none (max_tokens=0)."""
        if self._body.max_tokens > 0:
            return output
        samples = [
            replace(
                sample,
                text="",
                token_ids=[],
                logprobs=None if sample.logprobs is None else [],
                finish_reason="length" if sample.finished() else None,
                stop_reason=None,
            )
            for sample in output.outputs
        ]
        return replace(output, outputs=samples)

    def _choices(self, prompt_index: int, output: RequestOutput) -> list[CompletionChoice]:
        """What is new of each sample; nothing for a sample without news."""
        choices: list[CompletionChoice] = []
        if self._echoes_logprobs and len(output.prompt_logprobs or ()) < len(output.prompt_token_ids):
            return choices  # another sample may be ahead of the one that reports the prompt's
        for sample in output.outputs:
            index = prompt_index * self._body.n + sample.index
            state = self._samples.setdefault(index, _Sample())
            if state.cursor.finished:
                continue
            delta = state.cursor.advance(sample)
            if delta.text or delta.finish_reason or (delta.token_ids and self._wants_tokens):
                choices.append(self._choice(index, state, delta, output, self._texts[prompt_index]))
        return choices

    @property
    def _echoes_logprobs(self) -> bool:
        return self._body.echo and self._body.logprobs is not None

    @property
    def _wants_tokens(self) -> bool:
        return self._body.logprobs is not None or self._body.return_token_ids

    def _choice(
        self, index: int, state: _Sample, delta: SampleDelta, output: RequestOutput, prompt_text: str
    ) -> CompletionChoice:
        body = self._body
        first, state.begun = not state.begun, True
        echoed = first and body.echo
        choice: CompletionChoice = {
            "index": index,
            "text": prompt_text + delta.text if echoed else delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if delta.logprobs is not None and body.logprobs is not None:
            prompt_ids = output.prompt_token_ids if echoed else []
            choice["logprobs"], state.offset = completion_logprobs(
                [*prompt_ids, *delta.token_ids],
                [*(output.prompt_logprobs or [])[: len(prompt_ids)], *delta.logprobs],
                body.logprobs,
                self._names,
                offset=state.offset,
                skip_special_tokens=body.skip_special_tokens,
            )
        if body.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or [], self._names)
        return choice

    def _envelope(self, choices: list[CompletionChoice]) -> CompletionResponse:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._service.model_name,
            "choices": choices,
        }
