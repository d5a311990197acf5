from __future__ import annotations

import pytest

from vattention.bench.workload import parse_requests
from vattention.errors import ConfigError


def test_reads_requests_and_skips_empty_lines() -> None:
    lines = [
        '{"prompt_token_ids": [5, 6], "max_tokens": 3}',
        "",
        '{"prompt_token_ids": [7], "max_tokens": 1, "ignore_eos": true, "n": 2, "temperature": 1.0}',
    ]
    first, second = parse_requests(lines, "file")
    assert (first.prompt_token_ids, first.params.max_tokens, first.params.n) == ([5, 6], 3, 1)
    assert first.params.greedy
    assert not first.params.ignore_eos
    assert (second.params.n, second.params.temperature, second.params.ignore_eos) == (2, 1.0, True)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "needs prompt_token_ids"),
        ('{"prompt_token_ids": [1]}', "needs prompt_token_ids and max_tokens"),
        ('{"prompt_token_ids": [1], "max_tokens": 1, "temprature": 1}', "knows .*temperature"),
        ('{"prompt_token_ids": [], "max_tokens": 1}', "at least one integer"),
        ('{"prompt_token_ids": ["a"], "max_tokens": 1}', "at least one integer"),
        ('{"prompt_token_ids": [1], "max_tokens": 0}', "max_tokens must be at least 1"),
        ('{"prompt_token_ids": [1], "max_tokens": "many"}', "max_tokens must be an integer"),
    ],
)
def test_a_bad_line_is_named(line: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"file, line 2: .*{reason}"):
        parse_requests(['{"prompt_token_ids": [1], "max_tokens": 1}', line], "file")


def test_no_requests_is_an_error() -> None:
    with pytest.raises(ConfigError, match="has no requests"):
        parse_requests(["", " "], "file")
