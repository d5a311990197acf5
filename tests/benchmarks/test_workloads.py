"""The lists must never change: figures are compared over years."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import workloads
from vattention.bench.workload import parse_requests

ROOT = Path(__file__).parent.parent.parent

CHECKSUMS = {
    ("w1",): "2c7a55bdbe86b5e8",
    ("w1", 16): "28ec0b44520480d1",
    ("w2",): "8630e2319d5abee2",
    ("w3",): "353d831904f0f30c",
    ("w4",): "9df2b248e663c5ca",
    ("w4", 8): "6d292a697dff7510",
    ("w5",): "0bbb41cf5c20353c",
    ("w6", 1, 256): "bc776c02ae5866cf",
    ("w6", 1, 1024): "ff26f4ca5093d529",
    ("w6", 4, 256): "bf7ae68c74ad4764",
    ("w6", 4, 256, 1): "12f310a344058a06",
    ("w6", 4, 1024): "5ab2f06d5dc60b6e",
    ("w6", 16, 256): "fd642213cd228263",
    ("w6", 16, 1024): "22338d630aaa4c1b",
    ("w6", 64, 256): "1de7c87b519acfdf",
    ("w6", 64, 1024): "28defd20b8e42491",
}


@pytest.mark.parametrize("case", CHECKSUMS, ids=str)
def test_lists_are_what_they_always_were(case: tuple[str, int]) -> None:
    name, *numbers = case
    text = json.dumps(workloads.WORKLOADS[name](*numbers), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == CHECKSUMS[case]


@pytest.mark.parametrize("name", ["w1", "w2", "w3", "w4", "w5"])
def test_every_line_is_a_request_of_the_bench_command(name: str) -> None:
    requests = workloads.WORKLOADS[name]()
    parsed = parse_requests((json.dumps(request) for request in requests), name)
    assert [list(request.prompt_token_ids) for request in parsed] == [r["prompt_token_ids"] for r in requests]
    assert all(request.params.ignore_eos for request in parsed)
    assert {request.params.n for request in parsed} == ({8} if name == "w5" else {1})


def test_a_decode_rate_compares_lists_that_differ_in_max_tokens_only() -> None:
    many, one = workloads.w6(4, 256), workloads.w6(4, 256, out=1)
    assert [{**request, "max_tokens": 1} for request in many] == one


def test_the_script_writes_json_lines() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/workloads.py", "w6", "4", "256"], cwd=ROOT, capture_output=True, check=True
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == workloads.w6(4, 256)
