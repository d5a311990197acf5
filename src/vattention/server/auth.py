"""The API key, asked for before anything else sees the request."""

from __future__ import annotations

import hmac
from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from vattention.server.errors import ErrorReply

OPEN_PATHS = frozenset({"/", "/health", "/load", "/metrics", "/ping"})
"""Paths that need no key: probes and scrapers have none, and the page asks for it."""


class RequireKey:
    """ASGI middleware that answers 401 unless `Authorization: Bearer <key>` has the right key."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._holds_key(scope):
            await self._app(scope, receive, send)
            return
        reply = ErrorReply(
            HTTPStatus.UNAUTHORIZED,
            "this server wants its API key in the header Authorization: Bearer <key>",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await reply.response()(scope, receive, send)

    def _holds_key(self, scope: Scope) -> bool:
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        # In constant time: how long a comparison takes must not tell how much of a guess was right.
        return hmac.compare_digest(key.strip(), self._expected) and scheme.lower() == b"bearer"
