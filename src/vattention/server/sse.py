"""Server-sent events: a response that is a stream of JSON objects."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vattention.errors import VAttentionError
from vattention.server.errors import ErrorReply, reply_to
from vattention.server.hangup import ClientGoneError, until_hangup

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"

Events = AsyncGenerator[Mapping[str, Any], None]


_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def encode_event(data: Mapping[str, Any]) -> bytes:
    """One event; JSON has no line breaks of its own, so it needs one data line."""
    return b"data: %s\n\n" % _encoder.encode(data).encode()


class EventStream(Response):
    """Sends `events` as they come and `done` at the end; closes them when the client hangs up.

    The status waits for the first event, so that an error before it is an ordinary error response. A later one is
    sent as an event with OpenAI's error object, and ends the stream.
    """

    done = DONE

    def __init__(self, events: Events) -> None:
        super().__init__(status_code=HTTPStatus.OK, media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers["Cache-Control"] = "no-cache"
        self.headers["X-Accel-Buffering"] = "no"
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_hangup(receive, self._send(scope, receive, send))
        except ClientGoneError:
            return

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                first = await anext(events)
            except Exception as error:
                await _reply_to(error).response()(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await _send_body(send, self.encode(first))
            last = self.done
            try:
                async for event in events:
                    await _send_body(send, self.encode(event))
            except Exception as error:
                last = self.encode_error(_reply_to(error))
            await send({"type": "http.response.body", "body": last, "more_body": False})

    def encode(self, event: Mapping[str, Any]) -> bytes:
        return encode_event(event)

    def encode_error(self, reply: ErrorReply) -> bytes:
        return encode_event(reply.body())


def _reply_to(error: Exception) -> ErrorReply:
    if not isinstance(error, VAttentionError):
        logger.error("a stream failed for a reason nobody foresaw", exc_info=error)
    return reply_to(error)


async def _send_body(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
