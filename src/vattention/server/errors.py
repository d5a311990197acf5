"""Errors in the shape of OpenAI's API: `{"error": {"message", "type", "param", "code"}}` and a status."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import Request
from starlette.responses import Response

from vattention.errors import (
    EngineStoppedError,
    OutOfMemoryError,
    QueueFullError,
    RequestError,
    VAttentionError,
)
from vattention.server.hangup import ClientGoneError

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
RATE_LIMIT = "rate_limit_error"
MODEL_NOT_FOUND = "model_not_found"

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for logs; the client it is meant for has gone."""


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """What a client is told: `code` is machine-readable, `param` the field at fault."""

    status: int
    message: str
    type: str = INVALID_REQUEST
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), status_code=self.status, headers=dict(self.headers))


def reply_to(error: Exception) -> ErrorReply:
    """The reply to an error of ours, or to one nobody foresaw, of which the client learns nothing."""
    match error:
        case RequestError(code=code, param=param):
            status = HTTPStatus.NOT_FOUND if code == MODEL_NOT_FOUND else HTTPStatus.BAD_REQUEST
            return ErrorReply(status, str(error), param=param, code=code)
        case QueueFullError(retry_after_s=delay_s):
            headers = {"Retry-After": str(math.ceil(delay_s))}
            code = "rate_limit_exceeded"
            return ErrorReply(HTTPStatus.TOO_MANY_REQUESTS, str(error), type=RATE_LIMIT, code=code, headers=headers)
        case OutOfMemoryError():
            return ErrorReply(HTTPStatus.SERVICE_UNAVAILABLE, str(error), type=SERVER_ERROR, code="out_of_memory")
        case EngineStoppedError():
            return ErrorReply(HTTPStatus.SERVICE_UNAVAILABLE, str(error), type=SERVER_ERROR, code="engine_stopped")
        case VAttentionError():
            return ErrorReply(HTTPStatus.INTERNAL_SERVER_ERROR, str(error), type=SERVER_ERROR)
    message = "the server failed to answer this request; its log says why"
    return ErrorReply(HTTPStatus.INTERNAL_SERVER_ERROR, message, type=SERVER_ERROR)


def install(app: FastAPI) -> None:
    """Make `app` answer every error in this shape. To be called before middleware is added."""
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(VAttentionError, _on_error)
    app.add_exception_handler(ClientGoneError, _on_client_gone)
    # A handler for Exception would run outside all middleware, and its reply lack what they add.
    app.add_middleware(ServerErrorMiddleware, handler=_on_error)


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    return reply_to(error).response()


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.BAD_REQUEST and error.__cause__ is not None:
        return _reply_to_unparsed(error.__cause__).response()
    where = f"{request.method} {request.url.path}"
    message = {
        HTTPStatus.NOT_FOUND.value: f"there is nothing at {where}",
        HTTPStatus.METHOD_NOT_ALLOWED.value: f"{where} is not allowed; this path takes other methods",
    }.get(error.status_code, str(error.detail))
    return ErrorReply(error.status_code, message, headers=error.headers or {}).response()


def _reply_to_unparsed(cause: BaseException) -> ErrorReply:
    """To a body on which the JSON parser itself gave up."""
    match cause:
        case UnicodeDecodeError():
            reason = f"it is not UTF-8 (byte {cause.start})"
        case RecursionError():
            reason = "it is nested too deeply"
        case _:
            reason = str(cause)
    return ErrorReply(HTTPStatus.BAD_REQUEST, f"the body is not valid JSON: {reason}", code="invalid_json")


async def _on_invalid_body(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _reply_to_invalid(error.errors()[0]).response()


def _reply_to_invalid(problem: Mapping[str, Any]) -> ErrorReply:
    """From one of pydantic's error descriptions: its type, loc, msg and ctx."""
    kind, path = str(problem["type"]), problem["loc"][1:]
    param = problem.get("ctx", {}).get("param") or _param(path)
    if kind == "json_invalid":
        detail = problem.get("ctx", {}).get("error", problem["msg"])
        return ErrorReply(HTTPStatus.BAD_REQUEST, f"the body is not valid JSON: {detail}", code="invalid_json")
    if not path and param is None:
        message = "the body must be a JSON object, sent with Content-Type: application/json"
        return ErrorReply(HTTPStatus.BAD_REQUEST, message, code="invalid_type")
    if kind == "missing":
        message, code = f"the parameter {param!r} is missing", "missing_required_parameter"
    elif kind == "extra_forbidden":
        message, code = f"unknown parameter: {param!r}", "unknown_parameter"
    elif kind == "unsupported_parameter":
        message, code = str(problem["msg"]), kind
    else:
        message = f"{param}: {problem['msg']}"
        code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return ErrorReply(HTTPStatus.BAD_REQUEST, message, param=param, code=code)


def _param(path: Sequence[str | int]) -> str | None:
    """("messages", 0, "role") as messages[0].role."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path]
    return "".join(parts).removeprefix(".") or None
