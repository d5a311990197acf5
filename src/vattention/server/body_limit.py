"""Bounds on what a client can make the server hold, and for how long, before anything has looked at it."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vattention.server.errors import ErrorReply

REST_NBYTES = 8 * 2**20
"""For all that is no prompt: a logit_bias of the largest vocabularies, 262,144 tokens, is 5 MiB of JSON."""

PROMPT_NBYTES_PER_TOKEN = 16 * 32
"""Sixteen prompts that fill the context. A token is some five characters, which JSON may spell with 6 bytes each,
or an id of at most 10 digits."""

BODY_TIMEOUT_S = 60.0
"""For all of a body, from the end of the request's headers."""


def max_body_nbytes(max_model_len: int) -> int:
    """The largest body taken, for a context of so many tokens."""
    return REST_NBYTES + PROMPT_NBYTES_PER_TOKEN * max_model_len


class LimitBody:
    """ASGI middleware that answers 413 to larger bodies, and 408 to those that take too long.

    One that declares its length is refused before any of it is read, one that comes in chunks once too much of it
    has been. The HTTP server drops the rest, so the connection goes on; after 408 it is closed.
    """

    def __init__(self, app: ASGIApp, max_nbytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_nbytes = max_nbytes
        self._timeout_s = timeout_s

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
        deadline: float | None = asyncio.get_running_loop().time() + self._timeout_s

        async def receive_in_bounds() -> Message:
            nonlocal num_read, deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                reason = f"the request's body was not complete within {self._timeout_s:g} s"
                raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, reason, {"Connection": "close"}) from None
            if not message.get("more_body", False):
                deadline = None
            num_read += len(message.get("body", b""))
            if num_read > self._max_nbytes:
                # FastAPI, which is reading the body, makes a 400 of any other exception.
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, self._reason(f"more than {num_read:,}"))
            return message

        await self._app(scope, receive_in_bounds, send)

    def _reason(self, num_bytes: str) -> str:
        return (
            f"the request's body has {num_bytes} bytes; this server takes at most {self._max_nbytes:,}, so send "
            "fewer prompts at a time"
        )
