"""`vattention serve`: the HTTP server in the foreground."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from vattention.cli.files import read_text
from vattention.cli.info import memory
from vattention.cli.options import Options, OptionsOf, takes
from vattention.cli.sizes import size
from vattention.config import EngineConfig
from vattention.garbage import staying

if TYPE_CHECKING:
    from vattention.engine.async_engine import AsyncEngine

LogLevel = Literal["debug", "info", "warning", "error"]
Origins = Annotated[tuple[str, ...], Parameter(json_list=True, negative=(), show_default=" ".join)]


@takes(engine=OptionsOf(EngineConfig, "Engine", omit=("model",)))
def serve(
    model: str,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: Annotated[str | None, Parameter(env_var="VATTENTION_API_KEY")] = None,
    served_model_name: str | None = None,
    chat_template: Path | None = None,
    tool_call_parser: str | None = None,
    allowed_origins: Origins = ("*",),
    log_level: LogLevel = "info",
    engine: Options,
) -> None:
    """Serve a model over HTTP with OpenAI's API.

    Args:
        model: "demo", a Hugging Face id, a local folder, or a GGUF file.
        host: address to listen on; 0.0.0.0 for all of this machine's.
        port: port to listen on; 0 for one that is free.
        api_key: key that every request must bring; better in the environment, where other users do not see it.
        served_model_name: what clients call the model; by default MODEL.
        chat_template: a file with a Jinja chat template to use instead of the model's own.
        tool_call_parser: how the model writes calls of functions: hermes (also Qwen), llama3_json or mistral; by
            default what its chat template shows.
        allowed_origins: whose web pages may use the server from a browser, such as https://example.org, or * for
            all; once for each, or all as a JSON list.
        log_level: least important messages to log.
    """
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    template = None if chat_template is None else read_text(chat_template)
    config = EngineConfig(model=model, **engine)

    with staying():
        from vattention.server import bind, call_format_named

        call_format = None if tool_call_parser is None else call_format_named(tool_call_parser)
        listener = bind(host, port)
        try:
            from vattention.engine.async_engine import AsyncEngine
            from vattention.server import serve as run_server

            served = AsyncEngine.from_config(config)
        except BaseException:
            listener.close()
            raise
    name = served_model_name or served.model_name
    run_server(
        served,
        listener,
        served_model_name=name,
        api_key=api_key,
        chat_template=template,
        call_format=call_format,
        allowed_origins=allowed_origins,
        on_ready=lambda url: print(welcome(served, url, name, api_key), flush=True),
    )


def welcome(engine: AsyncEngine, url: str, name: str, api_key: str | None) -> str:
    """What the user sees once the server answers: where, what, with how much memory, and how to try it."""
    accounts = engine.statistics().accounts
    available = memory()["available_nbytes"]
    # Without a tokenizer the server takes and gives token ids.
    prompt = "The capital of France is" if engine.tokenizer is not None else [1, 2, 3]
    body = shlex.quote(json.dumps({"model": name, "prompt": prompt, "max_tokens": 16}))
    precision = "" if engine.config.quantization is None else f" in {engine.config.quantization}"
    key = ' -H "Authorization: Bearer $VATTENTION_API_KEY"' if api_key else ""
    return "\n".join(
        (
            "",
            f"  address    {url}",
            f"  model      {name}{precision}, up to {engine.max_model_len:,} tokens of context, "
            f"{engine.config.max_num_seqs:,} sequences at the same time",
            f"  memory     {size(available)} available, at most {size(accounts.limit_nbytes)} for the KV cache",
            f"  KV cache   {size(accounts.reserved_nbytes)} of addresses reserved, "
            f"{size(accounts.mapped_nbytes)} of memory mapped behind them so far",
            "",
            f"  try        curl {url}/v1/completions -H 'Content-Type: application/json'{key} -d {body}",
            "",
        )
    )
