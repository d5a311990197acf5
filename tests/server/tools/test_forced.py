from __future__ import annotations

import pytest

from vattention.errors import RequestError
from vattention.server.tools import Function, forced_calls, format_named
from vattention.structured_outputs import json_value


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral"])
def test_arguments_are_written_as_any_json(name: str) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    grammar = forced_calls(format_named(name), [Function("f", schema)], {}, only_one=True)
    assert grammar.endswith(f"arguments0: {json_value(schema)}")


def test_numbers_that_json_has_not() -> None:
    with pytest.raises(RequestError, match="parameters of 'f'") as refusal:
        forced_calls(format_named("hermes"), [Function("f", {"const": float("nan")})], {}, only_one=True)
    assert refusal.value.param == "tools"
