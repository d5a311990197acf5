"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from vattention.errors import RequestError
from vattention.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from vattention.sampling_params import SamplingParams
from vattention.server.generation import Cursor, SampleDelta, finish_reason, outputs_of, usage
from vattention.server.hangup import until_hangup
from vattention.server.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from vattention.server.protocol import Usage
from vattention.server.protocol_chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionRequest,
    ChatLogprobs,
)
from vattention.server.replies import PlainText, ReplyText, TextWithCalls
from vattention.server.service import Service, response_id
from vattention.server.sse import Events, EventStream
from vattention.server.tools import Function, forced_calls


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def create_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
        service.check_model(body.model)
        reply = _Reply(service, body)
        if body.stream:
            return EventStream(reply.events())
        return JSONResponse(await until_hangup(request.receive, reply.response()))

    return router


class _Reply:
    """One request: a conversation in, its next message out, whole or in pieces."""

    def __init__(self, service: Service, body: ChatCompletionRequest) -> None:
        self._service = service
        self._body = body
        self._id = response_id("chatcmpl", body)
        self._created = int(time.time())
        self._names = TokenNames(service.engine.tokenizer, body.return_tokens_as_token_ids)
        self._texts: list[ReplyText] = [PlainText() for _ in range(body.n)]

    async def response(self) -> ChatCompletion:
        async with self._outputs() as outputs:
            async for _, output in outputs:
                final = output
        completion: ChatCompletion = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._service.model_name,
            "choices": [self._choice(sample) for sample in final.outputs],
            "usage": usage([final]),
        }
        if self._body.return_token_ids:
            completion["prompt_token_ids"] = final.prompt_token_ids
        if self._body.prompt_logprobs is not None:
            completion["prompt_logprobs"] = prompt_logprobs(final.prompt_logprobs or [], self._names)
        return completion

    async def events(self) -> Events:
        cursors = [Cursor() for _ in range(self._body.n)]
        latest: RequestOutput | None = None
        async with self._outputs() as outputs:
            async for _, output in outputs:
                if latest is None:
                    for chunk in self._openings(output):
                        yield chunk
                latest = output
                for sample, cursor in zip(output.outputs, cursors, strict=True):
                    if cursor.finished:
                        continue
                    for choice in self._chunk_choices(sample.index, cursor.advance(sample)):
                        yield self._chunk([choice], output)
        if latest is not None and self._body.reports_usage:
            last = self._chunk([], latest)
            last["usage"] = usage([latest])
            yield last

    @asynccontextmanager
    async def _outputs(self) -> AsyncIterator[AsyncIterator[tuple[int, RequestOutput]]]:
        """Check everything, and submit the conversation."""
        body, service = self._body, self._service
        params = service.sampling(
            body,
            max_tokens=body.token_limit,
            logprobs=body.top_logprobs if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
        )
        token_ids = await service.render(body)
        params = replace(params, stop=(*params.stop_strings, *service.chat_stop_strings()))
        if body.shown_tools:
            params = self._expect_calls(params)
        service.check_context(token_ids, body.token_limit, body.token_limit_param)
        submitted = outputs_of(
            service.engine, [token_ids], params, priority=body.priority, cache_salt=body.cache_salt
        )
        try:
            async with submitted as outputs:
                yield outputs
        except RequestError as error:
            if error.param != "grammar" or body.tool_choice.mode != "required":
                raise
            raise RequestError(f"calls of these tools cannot be forced: {error}", param="tools") from error

    def _expect_calls(self, params: SamplingParams) -> SamplingParams:
        """Look out for calls in all texts, and let them keep what marks one."""
        call_format = self._service.call_format()
        known = frozenset(tool.function.name for tool in self._body.tools)
        choice = self._body.tool_choice
        only_one = choice.name is not None or not self._body.parallel_tool_calls
        self._texts = [TextWithCalls(call_format, known, only_one=only_one) for _ in range(self._body.n)]
        special = self._service.special_among(call_format.markers)
        if special:
            params = replace(params, skip_special_tokens=False)
        if choice.mode == "required":
            if params.grammar is not None:
                raise RequestError("forces calls, so the text cannot be anything else besides", param="tool_choice")
            functions = [
                Function(tool.function.name, tool.function.parameters)
                for tool in self._body.tools
                if choice.name in (None, tool.function.name)
            ]
            params = replace(params, grammar=forced_calls(call_format, functions, special, only_one=only_one))
        return params

    @property
    def _wants_tokens(self) -> bool:
        return self._body.logprobs or self._body.return_token_ids

    @property
    def _echoed(self) -> str:
        """The message that the reply goes on with, where the client wants it back."""
        last = self._body.messages[-1]
        return last.text if self._body.echo and last.role == self._body.reply_role else ""

    def _choice(self, sample: CompletionOutput) -> ChatChoice:
        text = self._texts[sample.index]
        content, calls = text.message(sample.text)
        choice: ChatChoice = {
            "index": sample.index,
            "message": {
                "role": self._body.reply_role,
                "content": self._echoed + (content or "") if self._echoed else content,
                "refusal": None,
            },
            "logprobs": self._logprobs(sample.token_ids, sample.logprobs),
            "finish_reason": text.finish_reason(finish_reason(sample)),
            "stop_reason": sample.stop_reason,
        }
        if calls:
            choice["message"]["tool_calls"] = calls
        if self._body.return_token_ids:
            choice["token_ids"] = sample.token_ids
        return choice

    def _openings(self, output: RequestOutput) -> list[ChatChunk]:
        """The first chunk of each choice: whose message it is."""
        chunks = []
        for index in range(self._body.n):
            delta: ChatChunkChoice = {
                "index": index,
                "delta": {"role": self._body.reply_role, "content": self._echoed},
                "logprobs": None,
                "finish_reason": None,
            }
            chunk = self._chunk([delta], output)
            if self._body.return_token_ids:
                chunk["prompt_token_ids"] = output.prompt_token_ids
            chunks.append(chunk)
        return chunks

    def _chunk_choices(self, index: int, news: SampleDelta) -> list[ChatChunkChoice]:
        """What is new of one sample, in one choice for each part; nothing where there is nothing to tell."""
        text = self._texts[index]
        deltas = text.deltas(news.text, finished=news.finish_reason is not None)
        if not deltas and (news.finish_reason or (news.token_ids and self._wants_tokens)):
            deltas = [{}]
        choices: list[ChatChunkChoice] = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
        ]
        if choices:
            choices[0]["logprobs"] = self._logprobs(news.token_ids, news.logprobs)
            choices[-1]["finish_reason"] = text.finish_reason(news.finish_reason)
            if news.finish_reason is not None:
                choices[-1]["stop_reason"] = news.stop_reason
            if self._body.return_token_ids:
                choices[0]["token_ids"] = news.token_ids
        return choices

    def _logprobs(self, token_ids: list[int], entries: list[TokenLogprobs] | None) -> ChatLogprobs | None:
        if entries is None or not self._body.logprobs:
            return None
        return chat_logprobs(token_ids, entries, self._body.top_logprobs, self._names)

    def _chunk(self, choices: list[ChatChunkChoice], output: RequestOutput) -> ChatChunk:
        chunk: ChatChunk = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._service.model_name,
            "choices": choices,
        }
        if self._body.reports_usage:
            now: Usage | None = usage([output]) if self._body.reports_usage_always else None
            chunk["usage"] = now
        return chunk
