"""/v1/chat/completions."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from vattention.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from vattention.server.generation import Cursor, SampleDelta, finish_reason, usage
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
from vattention.server.service import Service, response_id
from vattention.server.sse import Events, EventStream
from vattention.server.turn import Turn


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
        self._turn = Turn(service, body)

    async def response(self) -> ChatCompletion:
        async with self._turn.outputs() as outputs:
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
        async with self._turn.outputs() as outputs:
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

    @property
    def _wants_tokens(self) -> bool:
        return self._body.logprobs or self._body.return_token_ids

    @property
    def _echoed(self) -> str:
        """The message that the reply goes on with, where the client wants it back."""
        last = self._body.messages[-1]
        return last.text if self._body.echo and last.role == self._body.reply_role else ""

    def _choice(self, sample: CompletionOutput) -> ChatChoice:
        text = self._turn.texts[sample.index]
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
        text = self._turn.texts[index]
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
