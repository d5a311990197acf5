"""Work that ends when the client does."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client hung up; nobody is there to tell."""


async def until_hangup(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, and cancel it at once when the client disconnects.

    Args:
        receive: the request's, with the body already read.

    Raises:
        ClientGoneError: the client hung up; `work` has been cancelled and has cleaned up after itself.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_hangup(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _hangup(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
