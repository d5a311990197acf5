from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.model.tiny import tiny_tokenizer
from vattention.errors import RequestError
from vattention.model.grammar import Grammars
from vattention.sampling_params import SamplingParams
from vattention.structured_outputs import StructuredOutputsParams

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ['é/\\"', "b"]}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def accepts() -> Callable[[str, str], bool]:
    """Whether a grammar takes a text from beginning to end."""
    from llguidance import LLMatcher

    tokenizer = tiny_tokenizer()
    grammars = Grammars(tokenizer, frozenset({2}))

    def accepts(lark: str, text: str) -> bool:
        matcher = LLMatcher(grammars.read_vocabulary(), LLMatcher.grammar_from_lark(lark), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = tokenizer.encode(text, add_special_tokens=False)
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    return accepts


@pytest.mark.parametrize(
    ("values", "fits", "does_not"),
    [
        ({"json": SCHEMA}, '{"name": "é/\\\\\\"", "age": 7}', '{"name": "c", "age": 7}'),
        ({"json": json.dumps(SCHEMA)}, '{"name": "b", "age": 7}', '{"name": "b"}'),
        ({"json": {"type": "array", "items": {"type": "boolean"}}}, "[true, false]", "[true, 1]"),
        ({"json_object": True}, '{"a": [1, {"b": null}]}', "[1]"),
        ({"regex": r"\d+/\w\\/"}, "12/a\\/", "12-a"),
        ({"regex": r"^ab\$$"}, "ab$", "ab"),
        ({"regex": "a\nb"}, "a\nb", "a b"),
        ({"choice": ["yes", 'no "really" \\n', "é"]}, 'no "really" \\n', "maybe"),
        ({"grammar": 'start: "a"+ b\nb: "c" | "d"'}, "aaad", "aaae"),
    ],
)
def test_texts_that_fit(
    values: dict[str, Any], fits: str, does_not: str, accepts: Callable[[str, str], bool]
) -> None:
    lark = StructuredOutputsParams(**values).lark()
    assert accepts(lark, fits)
    assert not accepts(lark, does_not)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "take one of json, regex, choice, grammar, json_object, not none"),
        ({"json": {}, "regex": "a"}, "not json and regex"),
        ({"json_object": False}, "not none"),
        ({"json": "{"}, "json is no JSON"),
        ({"json": "[]"}, "json must be a schema"),
        ({"json": {"enum": [object()]}}, "json cannot be written as JSON"),
        ({"choice": []}, "choice must be a list of texts"),
        ({"choice": "yes"}, "choice must be a list of texts"),
        ({"choice": ["yes", ""]}, "choice must be text, not ''"),
        ({"regex": ""}, "regex must be text"),
        ({"grammar": 5}, "grammar must be text"),
    ],
)
def test_what_says_nothing_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as refusal:
        StructuredOutputsParams(**values)
    assert refusal.value.param == "structured_outputs"


def test_sampling_params_take_them_as_a_grammar() -> None:
    wanted = StructuredOutputsParams(choice=["a", "b"])
    params = SamplingParams(structured_outputs=wanted)
    assert params.grammar == wanted.lark()
    assert params.clone() == params
    with pytest.raises(RequestError, match="say the same"):
        SamplingParams(structured_outputs=wanted, grammar="start: /a/")
    with pytest.raises(RequestError, match="must be StructuredOutputsParams"):
        SamplingParams(structured_outputs={"choice": ["a"]})  # type: ignore[arg-type]
