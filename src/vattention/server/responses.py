"""/v1/responses: chat completions in the words of OpenAI's newer API. Nothing of a response is kept."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from vattention.errors import RequestError
from vattention.outputs import CompletionOutput, RequestOutput
from vattention.server.errors import ErrorReply
from vattention.server.generation import Cursor, finish_reason, usage
from vattention.server.hangup import until_hangup
from vattention.server.protocol_responses import RENAMED, ResponsesRequest
from vattention.server.response_items import Event, OutputItems, Status
from vattention.server.service import Service
from vattention.server.sse import Events, EventStream, encode_event
from vattention.server.turn import Turn


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/responses")
    async def create_response(request: Request, body: ResponsesRequest) -> Response:
        service.check_model(body.model)
        reply = _Reply(service, body)
        if body.stream:
            return _NumberedEvents(reply.events())
        return JSONResponse(await until_hangup(request.receive, reply.response()))

    return router


class _NumberedEvents(EventStream):
    """Events that have a name and a number; the last one says that it is."""

    done = b""

    def __init__(self, events: Events) -> None:
        super().__init__(events)
        self._num_sent = 0

    def encode(self, event: Mapping[str, Any]) -> bytes:
        numbered = {**event, "sequence_number": self._num_sent}
        self._num_sent += 1
        return b"event: %s\n%s" % (event["type"].encode(), encode_event(numbered))

    def encode_error(self, reply: ErrorReply) -> bytes:
        return self.encode({"type": "error", "code": reply.code, "message": reply.message, "param": reply.param})


class _Reply:
    """One request: a conversation in, its next message and calls out, whole or in pieces."""

    def __init__(self, service: Service, body: ResponsesRequest) -> None:
        chat = body.for_chat()
        self._service = service
        self._body = body
        self._id = f"resp_{chat.request_id or uuid.uuid4().hex}"
        self._created = int(time.time())
        self._turn = Turn(service, chat)
        self._cursor = Cursor()
        self._items = OutputItems()

    async def response(self) -> dict[str, Any]:
        async with self._outputs() as outputs:
            async for _, output in outputs:
                final = output
        for _ in self._news(final):
            pass
        return self._ended(final)

    async def events(self) -> Events:
        begun = False
        async with self._outputs() as outputs:
            async for _, output in outputs:
                if not begun:
                    begun = True
                    for kind in ("response.created", "response.in_progress"):
                        yield {"type": kind, "response": self._response("in_progress")}
                for event in self._news(output):
                    yield event
                final = output
        response = self._ended(final)
        yield {"type": f"response.{response['status']}", "response": response}

    @asynccontextmanager
    async def _outputs(self) -> AsyncIterator[AsyncIterator[tuple[int, RequestOutput]]]:
        """Errors name this API's fields."""
        try:
            async with self._turn.outputs() as outputs:
                yield outputs
        except RequestError as error:
            error.param = RENAMED.get(error.param or "", error.param)
            raise

    def _news(self, output: RequestOutput) -> Iterator[Event]:
        """What has come since the last call."""
        [sample] = output.outputs
        if self._cursor.finished:
            return
        text = self._cursor.advance(sample).text
        for delta in self._turn.texts[0].deltas(text, finished=self._cursor.finished):
            yield from self._items.add(delta)
        if self._cursor.finished:
            yield from self._items.finish(_status(sample))

    def _ended(self, output: RequestOutput) -> dict[str, Any]:
        [sample] = output.outputs
        status = _status(sample)
        counted = usage([output])
        return {
            **self._response(status),
            "incomplete_details": None if status == "completed" else {"reason": "max_output_tokens"},
            "output": self._items.items,
            "usage": {
                "input_tokens": counted["prompt_tokens"],
                "input_tokens_details": {**counted["prompt_tokens_details"], "cache_write_tokens": 0},
                "output_tokens": counted["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counted["total_tokens"],
            },
        }

    def _response(self, status: str) -> dict[str, Any]:
        """All that is known from the beginning."""
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "model": self._service.model_name,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": self._sampling("temperature"),
            "text": body.text.model_dump(by_alias=True, exclude_none=True),
            "tool_choice": body.tool_choice,
            "tools": [tool.model_dump(exclude_unset=True) for tool in body.tools],
            "top_p": self._sampling("top_p"),
            "truncation": "disabled",
            "usage": None,
        }

    def _sampling(self, name: str) -> float:
        """A sampling parameter: the client's, or the model's recommended value."""
        asked = getattr(self._body, name)
        return asked if asked is not None else float(self._service.engine.default_sampling.get(name, 1.0))


def _status(sample: CompletionOutput) -> Status:
    return "incomplete" if finish_reason(sample) == "length" else "completed"
