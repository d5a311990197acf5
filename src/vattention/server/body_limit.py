"""A bound on what a client can make the server hold before anything has looked at it."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vattention.server.errors import ErrorReply

REST_NBYTES = 8 * 2**20
"""For all that is no prompt: a logit_bias of the largest vocabularies, 262,144 tokens, is 5 MiB of JSON."""

PROMPT_NBYTES_PER_TOKEN = 16 * 32
"""Sixteen prompts that fill the context. A token is some five characters, which JSON may spell with 6 bytes each,
or an id of at most 10 digits."""


def max_body_nbytes(max_model_len: int) -> int:
    """The largest body taken, for a context of so many tokens."""
    return REST_NBYTES + PROMPT_NBYTES_PER_TOKEN * max_model_len


class LimitBody:
    """ASGI middleware that answers 413 to larger bodies.

    One that declares its length is refused before any of it is read, one that comes in chunks once too much of it
    has been. The HTTP server drops the rest, so the connection goes on.
    """

    def __init__(self, app: ASGIApp, max_nbytes: int) -> None:
        self._app = app
        self._max_nbytes = max_nbytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._max_nbytes:
            reply = ErrorReply(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, self._reason(f"{int(declared):,}"))
            await reply.response()(scope, receive, send)
            return
        num_read = 0

        async def receive_counted() -> Message:
            nonlocal num_read
            message = await receive()
            num_read += len(message.get("body", b""))
            if num_read > self._max_nbytes:
                # FastAPI, which is reading the body, makes a 400 of any other exception.
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, self._reason(f"more than {num_read:,}"))
            return message

        await self._app(scope, receive_counted, send)

    def _reason(self, num_bytes: str) -> str:
        return (
            f"the request's body has {num_bytes} bytes; this server takes at most {self._max_nbytes:,}, so send "
            "fewer prompts at a time"
        )
