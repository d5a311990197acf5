from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import pytest

from vattention.cli import chat
from vattention.errors import ContextLengthError
from vattention.outputs import CompletionOutput, RequestOutput
from vattention.sampling_params import SamplingParams

if TYPE_CHECKING:
    from vattention.engine.engine import LLMEngine

CONTEXT = 6
"""Most messages that the echo takes."""


class Echo:
    """An engine and its tokenizer: replies to the last message with itself in capitals, one letter a step."""

    model_name = "echo"

    def __init__(self, on_step: Callable[[int], None] = lambda _: None) -> None:
        self.on_step = on_step
        self.prompts: list[list[str]] = []
        self.templates: list[str | None] = []
        self.aborted: list[str] = []
        self.stops: list[object] = []
        self.steps = 0
        self.output: RequestOutput | None = None

    @property
    def tokenizer(self) -> Echo:
        return self

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, template: str | None = None, add_generation_prompt: bool = True
    ) -> list[str]:
        assert add_generation_prompt
        self.templates.append(template)
        return [f"{message['role']}: {message['content']}" for message in messages]

    def chat_stop_strings(self, template: str | None = None) -> tuple[str, ...]:
        return ("\nUser:",) if template is None else ()

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SamplingParams) -> None:
        self.stops.append(params.stop)
        if len(prompt["prompt_token_ids"]) > CONTEXT:
            raise ContextLengthError("the conversation is too long")
        self.prompts.append(prompt["prompt_token_ids"])
        self.output = RequestOutput(request_id, None, [], [CompletionOutput(0, "", [])], False)

    def has_unfinished_requests(self) -> bool:
        return self.output is not None

    def step(self) -> list[RequestOutput]:
        self.steps += 1
        self.on_step(self.steps)
        output = self.output
        assert output is not None
        text = self.prompts[-1][-1].removeprefix("user: ").upper()
        sample = output.outputs[0]
        sample.text = text[: len(sample.text) + 1]
        if sample.text == text:
            self.output = None
        return [output]

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.output = None


def talk(monkeypatch: pytest.MonkeyPatch, typed: str, engine: Echo, template: str | None = None) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    chat.converse(cast("LLMEngine", engine), SamplingParams(), template)


def test_replies_are_printed_and_remembered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Echo()
    talk(monkeypatch, "hello\n\nand you\n", engine, template="T")
    assert capsys.readouterr().out == "HELLO\nAND YOU\n"
    assert engine.prompts == [["user: hello"], ["user: hello", "assistant: HELLO", "user: and you"]]
    assert engine.templates == ["T", "T"]


def test_a_reply_ends_where_the_model_goes_on_with_the_users_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Echo()
    talk(monkeypatch, "hi\n", engine)
    talk(monkeypatch, "hi\n", engine, "{{ messages }}")
    assert engine.stops == [("\nUser:",), ()]


def test_reset_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Echo()
    talk(monkeypatch, "a\n/reset\nb\n", engine)
    assert engine.prompts == [["user: a"], ["user: b"]]


def test_control_c_stops_the_reply_and_keeps_what_was_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    engine = Echo(on_step=lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 3 else None)
    talk(monkeypatch, "abcdef\nx\n", engine)
    assert capsys.readouterr().out == "ABC\nX\n"
    assert engine.aborted == ["chat-0"]
    assert engine.prompts[1] == ["user: abcdef", "assistant: ABC", "user: x"]
    assert signal.getsignal(signal.SIGINT) is before


def test_control_c_at_the_prompt_explains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def typed() -> Iterator[str]:
        yield "a"
        raise KeyboardInterrupt

    lines = typed()

    def read(_prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    chat.converse(cast("LLMEngine", Echo()), SamplingParams(), None)
    shown = capsys.readouterr()
    assert shown.out == "A\n"
    assert "Ctrl-D ends" in shown.err


def test_a_conversation_that_became_too_long_can_begin_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Echo()
    talk(monkeypatch, "a\nb\nc\nd\n/reset\ne\n", engine)
    shown = capsys.readouterr()
    assert shown.out == "A\nB\nC\nE\n"
    assert "too long; /reset begins anew" in shown.err
    assert engine.prompts[-1] == ["user: e"]
