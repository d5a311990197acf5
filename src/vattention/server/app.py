"""The application: routes, errors and the API key around one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib import resources

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client.exposition import choose_encoder
from starlette.middleware.cors import CORSMiddleware

from vattention import __version__
from vattention.errors import EngineStoppedError
from vattention.server import chat, completions, errors, responses, tokens
from vattention.server.auth import RequireKey
from vattention.server.body_limit import BODY_TIMEOUT_S, LimitBody, max_body_nbytes
from vattention.server.engine import ServedEngine
from vattention.server.metrics import EngineMetrics
from vattention.server.service import Service
from vattention.server.tools import CallFormat

PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
)
"""The page is one file, and talks to this server only."""

ALL_ORIGINS = ("*",)


def create_app(
    engine: ServedEngine,
    *,
    served_model_name: str | None = None,
    api_key: str | None = None,
    chat_template: str | None = None,
    call_format: CallFormat | None = None,
    allowed_origins: Sequence[str] = ALL_ORIGINS,
) -> FastAPI:
    """The HTTP API of an engine.

    Args:
        engine: stays the caller's, who shuts it down.
        served_model_name: what clients call the model; by default the engine's name for it.
        api_key: required of every request but those to `auth.OPEN_PATHS`, where given.
        chat_template: a Jinja template in place of the model's own.
        call_format: how the model writes calls of functions, in place of what its chat template shows.
        allowed_origins: those whose web pages may use the server from a browser, such as "https://example.org";
            "*" for all.
    """
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vattention-tokenizer")
    service = Service(engine, served_model_name or engine.model_name, chat_template, call_format, worker)
    metrics = EngineMetrics(engine, service.model_name)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        worker.shutdown()

    app = FastAPI(title="vattention", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    errors.install(app)
    app.add_middleware(LimitBody, max_nbytes=max_body_nbytes(engine.max_model_len), timeout_s=BODY_TIMEOUT_S)
    if api_key:
        app.add_middleware(RequireKey, api_key=api_key)
    if allowed_origins:
        # Around the key, since a browser asks without one whether it may send it. That all origins may ask does not
        # weaken it: browsers send a bearer token only for pages that have it.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    for router in (
        completions.routes(service),
        chat.routes(service),
        responses.routes(service),
        tokens.routes(service),
        _about(service),
        _probes(engine, metrics),
    ):
        app.include_router(router)
    return app


def _about(service: Service) -> APIRouter:
    router = APIRouter()
    page = resources.files("vattention.server").joinpath("page.html").read_text("utf-8")
    card = {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "vattention",
        "root": service.engine.config.model,
        "parent": None,
        "max_model_len": service.engine.max_model_len,
    }

    @router.get("/", include_in_schema=False)
    async def read_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    @router.get("/version")
    async def read_version() -> Response:
        return JSONResponse({"version": __version__})

    @router.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    @router.get("/v1/models/{model:path}")
    async def read_model(model: str) -> Response:
        service.check_model(model)
        return JSONResponse(card)

    return router


def _probes(engine: ServedEngine, metrics: EngineMetrics) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    @router.api_route("/ping", methods=["GET", "POST"], include_in_schema=False)
    async def check_health() -> Response:
        if not engine.healthy:
            raise EngineStoppedError("the engine does not take requests: it is shutting down or has died")
        return JSONResponse({"status": "ok"})

    @router.get("/load")
    async def read_load() -> Response:
        now = engine.statistics()
        return JSONResponse({"server_load": now.num_running + now.num_waiting})

    @router.get("/metrics")
    async def read_metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), status_code=HTTPStatus.OK, media_type=content_type)

    return router
