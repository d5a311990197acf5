"""`vattention bench throughput`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vattention.cli.files import open_output, read_lines
from vattention.cli.options import Options, OptionsOf, takes
from vattention.config import EngineConfig


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
