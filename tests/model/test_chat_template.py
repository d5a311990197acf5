from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.model.tiny import tiny_tokenizer
from vattention.errors import RequestError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "<|user|>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|user|>{% endif %}{{ mood }}"
)

HELLO = [{"role": "user", "content": "hello"}]


def rendered(messages: list[dict[str, Any]], model_template: str | None = TEMPLATE, **options: Any) -> str:
    tokenizer = tiny_tokenizer(**({"chat_template": model_template} if model_template else {}))
    return tokenizer.decode(tokenizer.apply_chat_template(messages, **options), skip_special_tokens=False)


def test_the_models_template_with_one_bos() -> None:
    assert rendered(HELLO) == "<s><|user|>hello</s><|user|>"
    assert rendered(HELLO, add_generation_prompt=False) == "<s><|user|>hello</s>"
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template(HELLO).count(1) == 1
    assert tokenizer.chat_stop_strings() == ()


def test_the_last_message_can_be_continued() -> None:
    messages = [*HELLO, {"role": "assistant", "content": "well"}]
    text = rendered(messages, add_generation_prompt=False, continue_final_message=True)
    assert text == "<s><|user|>hello</s><|user|>well"


def test_variables_reach_the_template() -> None:
    assert rendered(HELLO, mood="!").endswith("!")


def test_a_template_given_goes_first() -> None:
    assert rendered(HELLO, template="{{ messages[0].content }}") == "hello"
    assert tiny_tokenizer().chat_stop_strings("{{ messages[0].content }}") == ()


def test_which_template_is_used() -> None:
    of_its_own = tiny_tokenizer(chat_template={"default": TEMPLATE, "tool_use": "{{ tools }}"})
    assert of_its_own.chat_template_source() == TEMPLATE
    assert of_its_own.chat_template_source(with_tools=True) == "{{ tools }}"
    assert of_its_own.chat_template_source("{{ x }}", with_tools=True) == "{{ x }}"
    assert tiny_tokenizer(chat_template=TEMPLATE).chat_template_source(with_tools=True) == TEMPLATE
    assert "message.role" in tiny_tokenizer().chat_template_source()
    with pytest.raises(RequestError, match="no default"):
        tiny_tokenizer(chat_template={"rag": TEMPLATE}).chat_template_source()


def test_messages_too_deep_to_render_are_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(2000):
        deep = {"a": deep}
    with pytest.raises(RequestError, match="refused"):
        rendered(HELLO, mood=deep)


def test_the_plain_template_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    assert not tokenizer.has_chat_template
    messages = [{"role": "system", "content": "be kind"}, *HELLO]
    with caplog.at_level(logging.WARNING):
        token_ids = tokenizer.apply_chat_template(messages)
        tokenizer.apply_chat_template(messages)
    assert tokenizer.decode(token_ids, False) == "<s>System: be kind\nUser: hello\nAssistant:"
    assert "\nUser:" in tokenizer.chat_stop_strings()
    assert len(caplog.records) == 1


def test_the_plain_template_can_be_continued() -> None:
    messages = [*HELLO, {"role": "assistant", "content": "I am"}]
    text = rendered(messages, None, add_generation_prompt=False, continue_final_message=True)
    assert text == "<s>User: hello\nAssistant: I am"


def test_text_parts_become_one_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "one\ntwo" in rendered([{"role": "user", "content": parts}])


def test_no_content_is_empty() -> None:
    assert rendered([{"role": "assistant", "content": None}]) == "<s><|user|></s><|user|>"


@pytest.mark.parametrize(
    ("messages", "options", "reason"),
    [
        ([], {}, "at least one"),
        ([{"content": "x"}], {}, "role"),
        ([{"role": "user", "content": 3}], {}, "content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], {}, "text only.*image_url"),
        ([{"role": "user", "content": [7]}], {}, "text only.*int"),
        ([{"role": "system", "content": "x"}], {}, "no system messages"),
        (HELLO, {"template": "{% if %}"}, "refused"),
        (HELLO, {"continue_final_message": True}, "exclude each other"),
        (HELLO, {"tokenize": True}, "tokenize"),
    ],
)
def test_what_is_refused(messages: list[dict[str, Any]], options: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        rendered(messages, **options)
