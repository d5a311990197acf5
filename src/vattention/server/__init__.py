"""OpenAI's HTTP API, with vLLM's extensions, on an engine. `create_app` builds it, `serve` runs it."""

from __future__ import annotations

from vattention.server.app import create_app
from vattention.server.lifecycle import bind, serve
from vattention.server.tools import format_named as call_format_named

__all__ = ["bind", "call_format_named", "create_app", "serve"]
