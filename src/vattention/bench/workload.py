"""What a benchmark asks of an engine: requests as token ids, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vattention.errors import ConfigError, RequestError
from vattention.sampling_params import SamplingParams

KEYS = frozenset({"prompt_token_ids", "max_tokens", "ignore_eos", "n", "temperature"})
"""What a line may say; a misspelt key would otherwise change the work unnoticed."""


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request: a prompt as token ids, and how to go on from it."""

    prompt_token_ids: Sequence[int]
    params: SamplingParams


def parse_requests(lines: Iterable[str], source: str) -> list[BenchRequest]:
    """Read requests; empty lines count for nothing.

    A line has `prompt_token_ids` and `max_tokens`, and may have `ignore_eos`, `n` and `temperature` (0 if missing).

    Args:
        source: where the lines are from, for error messages.

    Raises:
        ConfigError: a line is no request, or there is none; names the line.
    """
    requests = [
        _parse(line, f"{source}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()
    ]
    if not requests:
        raise ConfigError(f"{source} has no requests; write one JSON object a line")
    return requests


def _parse(line: str, where: str) -> BenchRequest:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    if not isinstance(fields, dict) or not {"prompt_token_ids", "max_tokens"} <= fields.keys() <= KEYS:
        raise ConfigError(f"{where}: needs prompt_token_ids and max_tokens, and knows {', '.join(sorted(KEYS))}")
    fields.setdefault("temperature", 0.0)
    token_ids = fields.pop("prompt_token_ids")
    if not (isinstance(token_ids, list) and token_ids and all(type(token) is int for token in token_ids)):
        raise ConfigError(f"{where}: prompt_token_ids must be a list of at least one integer")
    try:
        return BenchRequest(token_ids, SamplingParams(**fields))
    except (RequestError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error
