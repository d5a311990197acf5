"""`vattention bench throughput` and `vattention bench memory`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vattention.cli.files import open_output, read_lines
from vattention.cli.options import Options, OptionsOf, takes
from vattention.config import EngineConfig
from vattention.errors import ConfigError


@takes(engine=OptionsOf(EngineConfig, "Engine", omit=("model",)))
def throughput(
    model: str,
    /,
    *,
    requests: Path,
    output: Annotated[Path | None, Parameter(name="--json")] = None,
    engine: Options,
) -> None:
    """Measure offline throughput: all requests at once.

    Loading the model and a short warm-up are not in the figures.

    Args:
        model: "demo", a Hugging Face id, a local folder, or a GGUF file.
        requests: the work, one JSON object a line with prompt_token_ids and max_tokens, and optionally
            ignore_eos, n and temperature (0 unless given).
        output: write the figures to this file too, as JSON.
    """
    from vattention.bench.workload import parse_requests

    work = parse_requests(read_lines(requests), str(requests))
    config = EngineConfig(model=model, **engine)

    from vattention.bench.throughput import measure, warm_up
    from vattention.engine.engine import LLMEngine

    with nullcontext() if output is None else open_output(output) as sink:
        served = LLMEngine.from_config(config)
        try:
            warm_up(served, work)
            figures = measure(served, work)
        finally:
            served.close()
        print(figures.summary())
        if sink is not None:
            json.dump(figures.to_json(), sink, indent=2)
            sink.write("\n")


def memory(
    model: str = "demo",
    /,
    *,
    only: Annotated[Sequence[str], Parameter(negative=())] = (),
    scale: float = 1.0,
    seed: int = 0,
    output: Annotated[Path | None, Parameter(name="--json")] = None,
    plot: Path | None = None,
) -> None:
    """Compare memory managers: what share of the KV cache holds tokens, how many requests run, what sharing saves.

    Tables in Markdown, with the figures of the papers on PagedAttention and vAttention beside ours. Loads on
    real models' shapes are simulated; the part "live" serves the model.

    Args:
        model: for the live part: "demo", a Hugging Face id, a local folder, or a GGUF file.
        only: one part of the benchmark: usage, pages, sharing, prefix or live; give it again for more of them.
        scale: of the number of requests; 0.1 is a quick look.
        seed: of lengths and arrivals.
        output: write the figures to this file too, as JSON.
        plot: a folder to draw the tables into, as SVG; needs matplotlib.
    """
    from vattention.bench.memory import plots, report
    from vattention.bench.memory.settings import Settings

    if scale <= 0:
        raise ConfigError(f"--scale must be above 0, not {scale:g}")
    if plot is not None:
        plots.load()
    settings = Settings(model=model, seed=seed, scale=scale)
    with nullcontext() if output is None else open_output(output) as sink:
        tables = report.run(settings, only, lambda table: print(table.markdown(), flush=True))
        if sink is not None:
            json.dump(report.to_json(settings, only, tables), sink, indent=2)
            sink.write("\n")
    for path in plots.draw(tables, plot) if plot is not None else ():
        print(f"wrote {path}", file=sys.stderr)
