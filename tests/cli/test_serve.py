from __future__ import annotations

import json
import shlex
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from vattention.cli.main import USER_ERROR, main
from vattention.cli.serve import welcome
from vattention.config import EngineConfig
from vattention.kv.manager import Accounts

GIB = 2**30


def engine(tokenizer: object = "any") -> Any:
    accounts = Accounts(300 * GIB, 20 * GIB, 2**20, 0, 0, 0, 0)
    return SimpleNamespace(
        config=EngineConfig(model="tiny"),
        max_model_len=32768,
        tokenizer=tokenizer,
        statistics=lambda: SimpleNamespace(accounts=accounts),
    )


def test_the_welcome_says_where_what_and_how_much() -> None:
    shown = welcome(engine(), "http://127.0.0.1:8000", "tiny", None)
    assert "address    http://127.0.0.1:8000\n" in shown
    assert "model      tiny, up to 32,768 tokens" in shown
    assert "at most 20 GiB for the KV cache" in shown
    assert "300 GiB of addresses reserved, 1 MiB of memory mapped" in shown


@pytest.mark.parametrize(
    ("tokenizer", "kind"), [("any", str), (None, list)], ids=["with tokenizer", "without tokenizer"]
)
def test_the_line_to_try_is_a_valid_request(tokenizer: object, kind: type) -> None:
    shown = welcome(engine(tokenizer), "http://127.0.0.1:8000", "it's mine", None)
    command = shlex.split(next(line for line in shown.splitlines() if "curl" in line))
    assert command[1:3] == ["curl", "http://127.0.0.1:8000/v1/completions"]
    body = json.loads(command[command.index("-d") + 1])
    assert body["model"] == "it's mine"
    assert isinstance(body["prompt"], kind)


def test_the_key_is_not_shown() -> None:
    shown = welcome(engine(), "http://127.0.0.1:8000", "tiny", "secret")
    assert "secret" not in shown
    assert "Authorization: Bearer $VATTENTION_API_KEY" in shown


def test_a_port_in_use_is_known_before_the_model_loads(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "/no/such/model", "--port", str(port)]) == USER_ERROR
    assert f"port {port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "origins"),
    [
        ([], ("*",)),
        (["--allowed-origins", "https://a.example"], ("https://a.example",)),
        (
            ["--allowed-origins", "https://a.example", "--allowed-origins=http://b"],
            ("https://a.example", "http://b"),
        ),
        (["--allowed-origins", '["https://a.example", "http://b"]'], ("https://a.example", "http://b")),
        (["--allowed-origins", "[]"], ()),
    ],
)
def test_origins_one_by_one_or_as_vllm_takes_them(
    arguments: list[str], origins: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def serve(engine: object, listener: socket.socket, **options: Any) -> None:
        listener.close()
        given.update(options)

    monkeypatch.setattr("vattention.engine.async_engine.AsyncEngine.from_config", lambda config: engine())
    monkeypatch.setattr("vattention.server.serve", serve)
    assert main(["serve", "tiny", "--port", "0", "--served-model-name", "tiny", *arguments]) == 0
    assert given["allowed_origins"] == origins


def test_an_unknown_tool_call_parser_is_known_before_the_model_loads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "/no/such/model", "--port", "0", "--tool-call-parser", "morse"]) == USER_ERROR
    assert "'morse'; --tool-call-parser takes hermes, llama3_json, mistral" in capsys.readouterr().err
