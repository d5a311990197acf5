from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.tools.families import FAMILIES, Family, Written
from vattention.server.tools import Call, CallSplitter, Content, Piece
from vattention.server.tools.calls import MOST_DEPTH
from vattention.server.tools.hermes import Hermes
from vattention.server.tools.llama import Llama
from vattention.server.tools.mistral import Mistral
from vattention.server.tools.reading import CallFormat

KNOWN = frozenset({"look", "go_to"})
FORMATS = (Hermes(), Llama(), Mistral())

LOOK = '{"name": "look", "arguments": {"at": "x"}}'
BOTH_KEYS = '{"name": "look", "parameters": {"at": "x"}}'
CALLED = [("look", {"at": "x"})]


def split(call_format: CallFormat, *texts: str, **options: Any) -> tuple[str, list[tuple[str, Any]]]:
    """What a reply that comes in these parts gives: content, and calls with their arguments."""
    splitter = CallSplitter(call_format, KNOWN, **options)
    pieces: list[Piece] = [piece for text in texts for piece in splitter.feed(text)]
    pieces += splitter.finish()
    content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    calls = [(piece.name, json.loads(piece.arguments)) for piece in pieces if isinstance(piece, Call)]
    assert splitter.num_calls == len(calls) or options
    return content, calls


families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@families
@pytest.mark.parametrize(
    "calls",
    [
        [("look", {"at": "x"})],
        [("look", {}), ("go_to", {"x": 1.5, "y": -2, "fast": None})],
        [("look", {"text": '</tool_call> [TOOL_CALLS] <|python_tag|> {"name": "look"} \\ " \n ; 日本 🎉'})],
        [("look", {"deep": {"list": [[], {}, [{"a": "]}"}]]}})] * 3,
    ],
)
def test_reads_calls(family: Family, calls: Written) -> None:
    assert split(family.format, family.write(calls)) == ("", list(calls))


@pytest.mark.parametrize("before", ["Let me look.", "See { and [ and <tool", 'A "quoted" word'])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family.name != "llama"], ids=lambda f: f.name)
def test_text_before_calls_is_content(family: Family, before: str) -> None:
    assert split(family.format, f"{before}\n\n{family.write(CALLED)}\n") == (before, CALLED)


def test_text_behind_and_between_calls_is_content() -> None:
    text = f"a <tool_call>{LOOK}</tool_call>\n b \n<tool_call>{LOOK}</tool_call> c\n"
    assert split(Hermes(), text) == ("a\n b c\n", CALLED * 2)
    assert split(Llama(), f"{BOTH_KEYS} ; then {BOTH_KEYS}") == (f" ; then {BOTH_KEYS}", CALLED)
    assert split(Llama(), f"{BOTH_KEYS};\n") == (";\n", CALLED)
    assert split(Mistral(), f"[TOOL_CALLS][{LOOK}] and so on") == (" and so on", CALLED)


@pytest.mark.parametrize(
    ("call_format", "text"),
    [
        (Hermes(), f"<tool_call>{LOOK}"),
        (Hermes(), f"<tool_call>{LOOK}\n</tool"),
        (Hermes(), f"<tool_call>{BOTH_KEYS}</tool_call>"),
        (Llama(), '{"type": "function", "name": "look", "parameters": {"at": "x"}}'),
        (Llama(), f"\n{LOOK}"),
        (Llama(), f"<|python_tag|> {LOOK}"),
        (Mistral(), f"[TOOL_CALLS] [{LOOK}]"),
        (Mistral(), '[TOOL_CALLS]look{"at": "x"}'),
        (Mistral(), '[TOOL_CALLS]look[CALL_ID]a1B2c3D4e[ARGS]{"at": "x"}'),
    ],
)
def test_ways_to_write_the_same(call_format: CallFormat, text: str) -> None:
    content, calls = split(call_format, text)
    assert calls == CALLED
    assert content in {"", "\n</tool"}


def test_a_string_may_have_line_breaks() -> None:
    text = '<tool_call>{"name": "look", "arguments": {"at": "1\n2\t3"}}</tool_call>'
    assert split(Hermes(), text) == ("", [("look", {"at": "1\n2\t3"})])


NO_CALLS = [
    '{"name": "unknown", "arguments": {}}',
    '{"name": ["look"], "arguments": {}}',
    '{"name": "look", "arguments": "x"}',
    '{"name": "look", "arguments": {"at": "x"}',
    '{"name": "look", "arguments": {"at": x}}',
    '{"name": "look", "arguments": {"at": NaN}}',
    '{"name": "look", "arguments": {"at": 1e999}}',
    '{"name": "look", "arguments": {"at": "\\ud800"}}',
    '{"name": "look", "arguments": {"at": "x]}',
    "{'name': 'look', 'arguments': {}}",
    '{"arguments": {}}',
    '{"name": "look", "arguments": ' + '{"a": ' * MOST_DEPTH + "1" + "}" * (MOST_DEPTH + 1),
    '{"name": "look", "arguments": ' + '{"a": ' * 5000 + "1" + "}" * 5001,
    "{]",
    "look(at=x)",
    "",
]


@pytest.mark.parametrize("text", NO_CALLS, ids=range(len(NO_CALLS)))
@pytest.mark.parametrize(
    ("call_format", "form"),
    [
        (Hermes(), "a <tool_call>\n{}\n</tool_call> b"),
        (Hermes(), "<tool_call>{}"),
        (Llama(), "{}"),
        (Llama(), " a <|python_tag|>{} "),
        (Mistral(), "\n[TOOL_CALLS][{}]\n"),
        (Mistral(), "[TOOL_CALLS] {}"),
    ],
)
def test_what_only_looks_like_a_call_is_content(call_format: CallFormat, form: str, text: str) -> None:
    reply = form.replace("{}", text)
    assert split(call_format, reply) == (reply, [])
    assert split(call_format, *reply) == (reply, [])


@pytest.mark.parametrize("text", [text for text in NO_CALLS if '"x]' not in text], ids=str.__len__)
def test_a_broken_call_does_not_swallow_the_next(text: str) -> None:
    good, broken = f"<tool_call>{LOOK}</tool_call>", f"<tool_call>{text}</tool_call>"
    assert split(Hermes(), broken + good) == (broken, CALLED)


def test_unknown_names_in_mistrals_list_and_head() -> None:
    mixed = f'[TOOL_CALLS][{LOOK}, {{"name": "fly", "arguments": {{}}}}]'
    assert split(Mistral(), mixed) == (mixed, [])
    assert split(Mistral(), "[TOOL_CALLS]fly{}") == ("[TOOL_CALLS]fly{}", [])
    endless = "[TOOL_CALLS]" + "x" * 700 + "{}"
    assert split(Mistral(), *endless) == split(Mistral(), endless) == (endless, [])


def test_in_mid_text_llamas_json_is_no_call() -> None:
    text = f"Write {BOTH_KEYS}"
    assert split(Llama(), text) == (text, [])


def test_calls_are_nested_so_deep_and_no_deeper() -> None:
    arguments: Any = 1
    for _ in range(MOST_DEPTH - 1):
        arguments = {"a": arguments}
    text = f'{{"name": "look", "arguments": {json.dumps(arguments)}}}'
    assert split(Llama(), text) == ("", [("look", arguments)])
    assert split(Llama(), text.replace("1", "[1]")) == (text.replace("1", "[1]"), [])


@families
def test_a_call_comes_out_when_it_is_complete(family: Family) -> None:
    splitter = CallSplitter(family.format, KNOWN)
    text = family.write(CALLED).removesuffix("\n</tool_call>")
    assert [piece for char in text[:-1] for piece in splitter.feed(char)] == []
    pieces = splitter.feed(text[-1]) or splitter.feed("\n</tool_call>")
    assert pieces == [Call("look", '{"at": "x"}')]


@pytest.mark.parametrize("call_format", FORMATS, ids=lambda call_format: call_format.name)
def test_content_comes_out_at_once_but_for_what_may_begin_a_call(call_format: CallFormat) -> None:
    splitter = CallSplitter(call_format, KNOWN)
    assert splitter.feed("Now") == [Content("Now")]
    assert splitter.feed(" I look") == [Content(" I look")]
    assert splitter.feed(f". \n{call_format.markers[0][:5]}") == [Content(".")]
    assert splitter.feed("?") == [Content(f" \n{call_format.markers[0][:5]}?")]


@families
def test_only_the_first_call(family: Family) -> None:
    text = family.write([("look", {"at": "x"}), ("go_to", {})])
    assert split(family.format, text, " and more", only_one=True) == ("", CALLED)
    assert split(family.format, "text", only_one=True) == ("text", [])


PARTS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "look", "fly", LOOK, BOTH_KEYS),
    *("<", "<tool", "[TOOL", '{"name": "look"', *' \n;,{}[]"\\aé🎉'),
]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.lists(st.sampled_from(PARTS), max_size=12).map("".join),
    st.lists(st.integers(0, 10_000), max_size=8),
    st.booleans(),
)
def test_cuts_change_nothing_and_nothing_is_lost(
    call_format: CallFormat, text: str, cuts: list[int], only_one: bool
) -> None:
    places = sorted({cut % (len(text) + 1) for cut in cuts})
    parts = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    whole = split(call_format, text, only_one=only_one)
    assert split(call_format, *parts, only_one=only_one) == whole
    assert split(call_format, *text, only_one=only_one) == whole
    content, calls = whole
    if not calls:
        assert content == text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(FAMILIES),
    st.lists(
        st.tuples(st.sampled_from(sorted(KNOWN)), st.dictionaries(st.text(), json_values, max_size=3)),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 40),
)
def test_any_arguments_come_out_as_they_were_written(family: Family, calls: Written, size: int) -> None:
    text = family.write(calls)
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    assert split(family.format, *parts) == ("", list(calls))
