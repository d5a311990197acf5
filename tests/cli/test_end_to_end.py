"""The commands on a real, tiny model."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.model.tiny import byte_level, tiny_folder, tiny_llama
from vattention.cli.main import USER_ERROR, main

SOURCE = Path(__file__).parent.parent.parent / "src"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random Llama and its tokenizer."""
    return str(tiny_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def bare_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same without a tokenizer."""
    return str(tiny_folder(tmp_path_factory.mktemp("bare"), tokenizer=False))


def greedy(prompt: list[int], count: int) -> list[int]:
    """What transformers generates."""
    out = tiny_llama().generate(torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return [int(token) for token in out[0, len(prompt) :]]


def test_generate_says_what_transformers_says(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    prompts = ["hello world", "the quick brown fox"]
    options = ["--temperature", "0", "--max-tokens", "8", "--min-tokens", "8", "--max-num-seqs", "4"]
    assert main(["generate", model, *prompts, *options, "--output", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    tokenizer = byte_level()
    for line in lines:
        expected = greedy(tokenizer(line["prompt"])["input_ids"], 8)
        assert line["outputs"][0]["token_ids"] == expected
        assert line["outputs"][0]["text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_generate_without_a_tokenizer_takes_token_ids(bare_model: str, tmp_path: Path) -> None:
    work, out = tmp_path / "work.jsonl", tmp_path / "out.jsonl"
    work.write_text('{"prompt_token_ids": [5, 6, 7]}')
    options = ["--temperature", "0", "--max-tokens", "4", "--ignore-eos", "--skip-tokenizer-init"]
    assert main(["generate", bare_model, "--input", str(work), *options, "--output", str(out)]) == 0
    assert json.loads(out.read_text())["outputs"][0]["token_ids"] == greedy([5, 6, 7], 4)


def test_a_model_without_a_tokenizer_says_which_option_helps(
    bare_model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", bare_model, "hello"]) == USER_ERROR
    shown = capfd.readouterr().err
    assert "tokenizer" in shown
    assert "Traceback" not in shown


def test_bench_measures(bare_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work, out = tmp_path / "work.jsonl", tmp_path / "out.json"
    line = {"prompt_token_ids": list(range(3, 43)), "max_tokens": 6, "ignore_eos": True}
    work.write_text("\n".join(json.dumps(line | {"n": 1 + i % 2, "temperature": float(i % 2)}) for i in range(6)))
    arguments = ["--requests", str(work), "--json", str(out), "--skip-tokenizer-init", "--max-num-seqs", "4"]
    assert main(["bench", "throughput", bare_model, *arguments]) == 0
    figures = json.loads(out.read_text())
    assert (figures["num_prompt_tokens"], figures["num_output_tokens"]) == (240, 54)
    peak = figures["kv_peak"]
    assert 0 < peak["token_nbytes"] <= peak["mapped_nbytes"] < peak["reserved_nbytes"]
    assert "without model load and warm-up" in capsys.readouterr().out


def test_chat_replies(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/reset\nhello\n"))
    assert main(["chat", model, "--temperature", "0", "--max-tokens", "6", "--ignore-eos"]) == 0
    replies = capsys.readouterr().out.splitlines()
    # The same reply to the same words, since nothing is remembered.
    half = len(replies) // 2
    assert half
    assert replies[:half] == replies[half:]


@pytest.fixture
def server(model: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`vattention serve` on a free port, and what it printed once it was ready."""
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-m", "vattention", "serve", model, "--port", "0", "--max-num-seqs", "4"],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    stdout = process.stdout
    assert stdout is not None
    try:
        shown = ""
        while "curl" not in shown:
            line = stdout.readline()
            assert line, (tmp_path / "log").read_text()
            shown += line
        yield process, shown
    finally:
        process.kill()
        process.wait()
        stdout.close()
        log.close()


def test_serve_prints_a_line_that_works_and_ends_on_a_signal(server: tuple[subprocess.Popen[str], str]) -> None:
    process, shown = server
    address = re.search(r"address +(http://127\.0\.0\.1:\d+)$", shown, re.MULTILINE)
    assert address is not None
    assert re.search(r"memory +[\d.,]+ GiB available, at most [\d.,]+ [GT]iB for the KV cache", shown)
    command = shlex.split(next(line for line in shown.splitlines() if "curl" in line))[1:]
    request = urllib.request.Request(
        command[1], data=command[command.index("-d") + 1].encode(), headers={"Content-Type": "application/json"}
    )
    assert command[1].startswith(address[1])
    with urllib.request.urlopen(request, timeout=60) as reply:
        body = json.load(reply)
    assert body["usage"]["completion_tokens"] > 0
    assert isinstance(body["choices"][0]["text"], str)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
