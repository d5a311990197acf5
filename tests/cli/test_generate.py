from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine.fakes import FakeRunner, completion, fake_engine
from vattention.cli.generate import read_prompts
from vattention.cli.main import USER_ERROR, main
from vattention.engine.engine import LLMEngine
from vattention.errors import ConfigError


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> FakeRunner:
    """The runner of the fake engine that the command gets."""
    runner = FakeRunner()
    monkeypatch.setattr(LLMEngine, "from_config", lambda _config: fake_engine(runner=runner))
    return runner


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_prompts_of_a_file_become_lines_in_the_same_order(runner: FakeRunner, tmp_path: Path) -> None:
    prompts = [[3, 4, 5], [6] * 40, [7, 8]]
    work, out = tmp_path / "work.jsonl", tmp_path / "out.jsonl"
    # The first takes longest, so that the others wait for it.
    lengths = [20, 2, 5]
    work.write_text(
        "\n".join(
            json.dumps({"prompt_token_ids": prompt, "max_tokens": length})
            for prompt, length in zip(prompts, lengths, strict=True)
        )
    )
    assert main(["generate", "fake", "--input", str(work), "--output", str(out), "--temperature", "0"]) == 0
    lines = written(out)
    assert [line["index"] for line in lines] == [0, 1, 2]
    for line, prompt, length in zip(lines, prompts, lengths, strict=True):
        assert line["prompt_token_ids"] == prompt
        assert line["outputs"][0]["token_ids"] == completion(prompt, length)
        assert line["outputs"][0]["finish_reason"] == "length"
    assert runner.closed


def test_without_an_output_file_lines_go_to_standard_output_and_progress_elsewhere(
    runner: FakeRunner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work.jsonl"
    work.write_text('{"prompt_token_ids": [3]}')
    assert main(["generate", "fake", "--input", str(work), "--n", "2", "--logprobs", "1", "--max-tokens", "3"]) == 0
    shown = capsys.readouterr()
    (line,) = [json.loads(text) for text in shown.out.splitlines()]
    assert [sample["index"] for sample in line["outputs"]] == [0, 1]
    assert [len(sample["logprobs"]) for sample in line["outputs"]] == [3, 3]
    assert "Requests" in shown.err


def test_a_failed_request_is_told_in_its_line_and_in_the_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = FakeRunner(fail_at=1)
    monkeypatch.setattr(LLMEngine, "from_config", lambda _config: fake_engine(runner=runner))
    work, out = tmp_path / "work.jsonl", tmp_path / "out.jsonl"
    # The failing step holds the first prompt and the first chunk of the second; the others come after it.
    prompts = [[3, 4], [5] * 30, [6], [7], [8]]
    work.write_text("\n".join(json.dumps({"prompt_token_ids": prompt, "max_tokens": 2}) for prompt in prompts))
    assert main(["generate", "fake", "--input", str(work), "--output", str(out)]) == USER_ERROR
    assert "2 of 5 requests failed" in capsys.readouterr().err
    assert [line["outputs"][0]["finish_reason"] for line in written(out)] == ["error"] * 2 + ["length"] * 3
    first = written(out)[0]
    assert "injected failure" in first["error"]
    assert first["outputs"][0]["finish_reason"] == "error"
    assert runner.closed


def test_an_invalid_prompt_ends_the_command_before_anything_is_computed(
    runner: FakeRunner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work.jsonl"
    work.write_text('{"prompt_token_ids": [3]}\n{"prompt_token_ids": [1000]}')
    assert main(["generate", "fake", "--input", str(work)]) == USER_ERROR
    assert "1000 is not a token id" in capsys.readouterr().err
    assert runner.num_forwards == 0
    assert runner.closed


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('one\n\n{"two": 2}\n')
    assert read_prompts(path) == [("one", {}), ('{"two": 2}', {})]


def test_a_json_lines_file_has_texts_tokens_and_parameters(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"one"\n{"prompt": "two", "top_k": 3}\n{"prompt_token_ids": [1], "stop": "x"}\n')
    assert read_prompts(path) == [
        ("one", {}),
        ({"prompt": "two"}, {"top_k": 3}),
        ({"prompt_token_ids": [1]}, {"stop": "x"}),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("3", "needs a text"),
        ("{}", "needs a text, or an object"),
        ('{"prompt": "a", "prompt_token_ids": [1]}', "needs a text, or an object"),
        ('{"prompt": "a", "temprature": 1}', "temprature"),
        ('{"prompt": "a", "top_p": 3}', "top_p must be"),
        ('{"prompt": "a", "n": "two"}', "n must be an integer"),
    ],
)
def test_a_bad_line_is_named(line: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'"good"\n{line}\n')
    with pytest.raises(ConfigError, match=f"prompts.jsonl, line 2: .*{reason}"):
        read_prompts(path)
