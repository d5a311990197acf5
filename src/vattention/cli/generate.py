"""`vattention generate`: prompts in, JSON lines out."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vattention.cli.files import open_output, read_lines
from vattention.cli.options import Options, OptionsOf, takes
from vattention.config import EngineConfig
from vattention.core import Prompt
from vattention.errors import ConfigError, RequestError, VAttentionError
from vattention.garbage import staying
from vattention.outputs import RequestOutput
from vattention.sampling_params import SamplingParams

if TYPE_CHECKING:
    from vattention.engine.engine import LLMEngine

PROMPT_KEYS = ("prompt", "prompt_token_ids")


@takes(
    engine=OptionsOf(EngineConfig, "Engine", omit=("model",)),
    # The engine's seed makes runs repeat; one seed for every request would give equal prompts equal samples.
    sampling=OptionsOf(SamplingParams, "Sampling", omit=("seed", "grammar")),
)
def generate(
    model: str,
    /,
    *prompts: str,
    input: Path | None = None,
    output: Path | None = None,
    engine: Options,
    sampling: Options,
) -> None:
    """Complete prompts, and write one line of JSON for each.

    Sampling options that are not given come from the model's generation_config.json, else have the defaults below.

    Args:
        model: "demo", a Hugging Face id, a local folder, or a GGUF file.
        prompts: texts to complete.
        input: a file with more prompts: one a line, or with the suffix .jsonl one JSON value a line: a text, or an
            object with prompt or prompt_token_ids and any sampling parameters of its own.
        output: write to this file instead of standard output.
    """
    work: list[tuple[Prompt, Options]] = [(prompt, {}) for prompt in prompts] + (
        [] if input is None else read_prompts(input)
    )
    if not work:
        raise ConfigError("there is nothing to complete; give prompts as arguments or with --input FILE")
    config = EngineConfig(model=model, **engine)
    SamplingParams(**sampling)  # a wrong option should not wait for the model to load

    failed = 0
    with nullcontext(sys.stdout) if output is None else open_output(output) as sink:
        with staying():
            from vattention.engine.engine import LLMEngine

            served = LLMEngine.from_config(config)
        try:
            for index, result in enumerate(complete(served, work, sampling)):
                failed += result.error is not None
                print(json.dumps(to_json(index, result), ensure_ascii=False), file=sink, flush=True)
        finally:
            served.close()
    if failed:
        raise VAttentionError(f"{failed} of {len(work)} requests failed; the error in their lines says why")


def read_prompts(path: Path) -> list[tuple[Prompt, Options]]:
    """Prompts of a file, each with the sampling parameters it brings. Empty lines are left out.

    Raises:
        ConfigError: the file cannot be read, or a line is no prompt; names the line.
    """
    lines = ((number, line) for number, line in enumerate(read_lines(path), start=1) if line.strip())
    if path.suffix != ".jsonl":
        return [(line, {}) for _, line in lines]
    return [_parse(line, f"{path}, line {number}") for number, line in lines]


def _parse(line: str, where: str) -> tuple[Prompt, Options]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    if isinstance(value, str):
        return value, {}
    if not isinstance(value, dict) or sum(key in value for key in PROMPT_KEYS) != 1:
        raise ConfigError(f"{where}: needs a text, or an object with one of {' and '.join(PROMPT_KEYS)}")
    prompt: Any = {key: value.pop(key) for key in PROMPT_KEYS if key in value}
    try:
        SamplingParams(**value)
    except (RequestError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error
    return prompt, value


def complete(
    engine: LLMEngine, work: Sequence[tuple[Prompt, Options]], sampling: Mapping[str, Any]
) -> Iterator[RequestOutput]:
    """Run all prompts together, with a progress bar, and yield their outputs in order, each as soon as it can be.

    Raises:
        RequestError: a prompt or its parameters are invalid; nothing was computed.
    """
    from tqdm import tqdm

    requests = [
        engine.prepare(str(index), prompt, SamplingParams(**{**engine.default_sampling, **sampling, **own}))
        for index, (prompt, own) in enumerate(work)
    ]
    for request in requests:
        engine.start(request)
    finished: dict[int, RequestOutput] = {}
    following = 0
    with tqdm(total=len(requests), desc="Requests", unit=" requests") as bar:
        while engine.has_unfinished_requests():
            for result in engine.step():
                if result.finished:
                    finished[int(result.request_id)] = result
                    bar.update()
            while following in finished:
                yield finished.pop(following)
                following += 1


def to_json(index: int, result: RequestOutput) -> dict[str, Any]:
    """One line of output: the request's number, its prompt, its samples, and what was asked for besides."""
    line: dict[str, Any] = {"index": index, "prompt": result.prompt}
    if result.prompt is None:
        line["prompt_token_ids"] = result.prompt_token_ids
    if result.prompt_logprobs is not None:
        line["prompt_logprobs"] = [
            position and {token: dataclasses.asdict(logprob) for token, logprob in position.items()}
            for position in result.prompt_logprobs
        ]
    line["outputs"] = [
        {
            key: value
            for key, value in dataclasses.asdict(sample).items()
            if value is not None or key == "stop_reason"
        }
        for sample in result.outputs
    ]
    if result.error is not None:
        line["error"] = str(result.error)
    return line
