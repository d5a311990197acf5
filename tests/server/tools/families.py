"""How each family of models writes calls, and chat templates that are built like theirs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.model.tiny import byte_level
from tests.server.fake_engine import BOS, ByteTokenizer, FakeEngine
from vattention.model.chat_template import ChatTemplate
from vattention.server.tools.hermes import Hermes
from vattention.server.tools.llama import Llama
from vattention.server.tools.mistral import Mistral
from vattention.server.tools.reading import CallFormat

Written = Sequence[tuple[str, dict[str, Any]]]
"""Names and arguments."""


def hermes_calls(calls: Written) -> str:
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
        for name, arguments in calls
    )


def llama_calls(calls: Written) -> str:
    return "; ".join(json.dumps({"name": name, "parameters": arguments}) for name, arguments in calls)


def tagged_llama_calls(calls: Written) -> str:
    return "<|python_tag|>" + llama_calls(calls)


def mistral_calls(calls: Written) -> str:
    return "[TOOL_CALLS]" + json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls])


def new_mistral_calls(calls: Written) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}" for name, arguments in calls)


MESSAGE = "<|{{ m.role }}|>{{ m.content }}{% if m.tool_call_id %}({{ m.tool_call_id }}){% endif %}"
TOOLS = "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
TURN = "{% if add_generation_prompt %}<|assistant|>{% endif %}"

HERMES_TEMPLATE = (
    TOOLS + "{% for m in messages %}" + MESSAGE + "{% for c in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}{% endfor %}" + TURN
)
LLAMA_TEMPLATE = (
    TOOLS + "{% for m in messages %}<|start_header_id|>" + MESSAGE + "{% for c in m.tool_calls or [] %}"
    '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
    "{% endfor %}{% endfor %}" + TURN
)
MISTRAL_TEMPLATE = (
    TOOLS + "{% for m in messages %}" + MESSAGE + "{% if m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
    "{{ c.function | tojson }}{% endfor %}]{% endif %}{% endfor %}" + TURN
)
TOOLLESS_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}" + TURN


@dataclass(frozen=True)
class Family:
    name: str
    format: CallFormat
    template: str
    write: Callable[[Written], str]


FAMILIES = (
    Family("hermes", Hermes(), HERMES_TEMPLATE, hermes_calls),
    Family("llama", Llama(), LLAMA_TEMPLATE, llama_calls),
    Family("llama tagged", Llama(), LLAMA_TEMPLATE, tagged_llama_calls),
    Family("mistral", Mistral(), MISTRAL_TEMPLATE, mistral_calls),
    Family("mistral new", Mistral(), MISTRAL_TEMPLATE, new_mistral_calls),
)


class TemplatedTokenizer(ByteTokenizer):
    """One token per byte, and a chat template that transformers renders.

    Args:
        special: what decoding leaves out.
    """

    def __init__(self, template: str | dict[str, str], special: tuple[str, ...] = ()) -> None:
        self._chat = ChatTemplate(byte_level(chat_template=template))
        self._special = special

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text = super().decode(token_ids, skip_special_tokens)
        for name in self._special if skip_special_tokens else ():
            text = text.replace(name, "")
        return text

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        given = {"add_generation_prompt": True, "continue_final_message": False, "template": None, "tools": None}
        return [BOS, *self._chat.render(messages, variables={}, **{**given, **options}).encode()]

    def chat_template_source(self, template: str | None = None, *, with_tools: bool = False) -> str:
        return self._chat.source(template, with_tools=with_tools)

    def chat_stop_strings(self, template: str | None = None) -> tuple[str, ...]:
        return ()


def engine_of(template: str | dict[str, str], special: tuple[str, ...] = (), **options: Any) -> FakeEngine:
    """An engine whose model has this chat template."""
    engine = FakeEngine(**options)
    engine.tokenizer = TemplatedTokenizer(template, special)
    engine.max_model_len = 100_000
    return engine
