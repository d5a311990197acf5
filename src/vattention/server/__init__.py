"""OpenAI's HTTP API, with vLLM's extensions, on an engine. `create_app` builds it, `serve` runs it."""

from __future__ import annotations

from vattention.server.app import create_app
from vattention.server.lifecycle import bind, serve

__all__ = ["bind", "create_app", "serve"]
