from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from tests.model.tiny import byte_fallback, byte_level
from vattention.errors import RequestError, VAttentionError
from vattention.model.grammar import Grammar, Grammars
from vattention.model.predictions import GivenLogits
from vattention.model.sampler import SampleRow, sample
from vattention.model.tokenizer import Tokenizer
from vattention.sampling_params import SamplingParams

pytest.importorskip("llguidance")

VOCAB, END = 400, 2
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}
OBJECT = "start: %json " + json.dumps({**SCHEMA, "x-guidance": {"whitespace_flexible": False}})

Make = Callable[[], PreTrainedTokenizerBase]
both = pytest.mark.parametrize("make", [byte_level, byte_fallback])


def grammar_of(text: str, make: Make = byte_level) -> Grammar:
    return Grammars(Tokenizer(make()), frozenset({END, 5000})).grammar(text)


def allowed(grammar: Grammar, output: list[int], size: int = VOCAB) -> set[int]:
    row = np.zeros(size, np.float32)
    grammar.mask().apply(row, output)
    assert set(row.tolist()) <= {0.0, -np.inf}
    return set(np.flatnonzero(row == 0.0).tolist())


def generate(grammar: Grammar | None, seed: int, max_tokens: int = 60, **params: Any) -> list[int]:
    """Tokens of a model that likes all of them alike."""
    output: list[int] = []
    mask = None if grammar is None else grammar.mask()
    row = SampleRow(SamplingParams(**params), seed, [1], output, frozenset({END}), mask)
    logits = torch.randn(max_tokens, VOCAB, generator=torch.Generator().manual_seed(seed))
    while len(output) < max_tokens and END not in output:
        [chosen] = sample(GivenLogits(logits[None, len(output)]), [0], [row])
        assert chosen.error is None
        output.append(chosen.token_id)
    return output


@both
def test_only_tokens_that_go_on(make: Make) -> None:
    tokenizer = Tokenizer(make())
    grammar = grammar_of('start: "the" | "to"', make)
    texts = {tokenizer.token_text(token).strip() for token in allowed(grammar, [])}
    assert texts <= {"t", "th", "the", "to"}
    assert "t" in texts


def test_at_its_end_the_end_token_alone() -> None:
    grammar = grammar_of('start: "ab"')
    ids = Tokenizer(byte_level()).encode("ab", add_special_tokens=False)
    assert END not in allowed(grammar, ids[:1])
    assert allowed(grammar, ids) == {END}
    assert END in allowed(grammar_of('start: "ab" "c"*'), ids)


def test_logits_beyond_the_tokenizers_vocabulary() -> None:
    assert max(allowed(grammar_of("start: /.*/"), [], 5000)) < 400
    assert allowed(grammar_of('start: "a"'), [], 10) == set()


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 1000), st.sampled_from([{}, {"temperature": 0.0}, {"top_p": 0.5}, {"repetition_penalty": 2.0}])
)
def test_what_is_drawn_is_of_the_grammar(seed: int, params: dict[str, Any]) -> None:
    text = Tokenizer(byte_level()).decode(generate(OBJECT_GRAMMAR, seed, **params))
    if len(text) < 50:
        value = json.loads(text)
        assert set(value) == {"n"}
        assert isinstance(value["n"], int)


OBJECT_GRAMMAR = grammar_of(OBJECT)


def test_without_it_nothing_of_the_kind_is_drawn() -> None:
    assert not Tokenizer(byte_level()).decode(generate(None, 1)).startswith("{")


def test_a_text_in_the_middle_goes_on_as_it_would_have() -> None:
    output = generate(OBJECT_GRAMMAR, 3)
    for length in range(len(output)):
        assert output[length] in allowed(OBJECT_GRAMMAR, output[:length])


def test_texts_do_not_share_their_state() -> None:
    one, other = OBJECT_GRAMMAR.mask(), OBJECT_GRAMMAR.mask()
    first = Tokenizer(byte_level()).encode("{", add_special_tokens=False)
    rows = np.zeros((2, VOCAB), np.float32)
    one.apply(rows[0], first)
    other.apply(rows[1], [])
    assert rows[1][first[0]] == 0.0
    assert rows[0][first[0]] == -np.inf


def test_what_is_no_grammar_is_refused() -> None:
    for text in ("", 'start: "x', "start: other", 'start: %json {"type": "text"}'):
        with pytest.raises(RequestError, match="cannot be used") as refusal:
            grammar_of(text)
        assert refusal.value.param == "grammar"
        assert "\n" not in str(refusal.value)


def test_tokens_that_are_not_of_it_are_an_error_of_the_one_text() -> None:
    with pytest.raises(VAttentionError, match="cannot be followed"):
        allowed(grammar_of('start: "ab"'), [50])
    row = SampleRow(SamplingParams(), 0, [1], [50], frozenset({END}), grammar_of('start: "ab"').mask())
    fine = SampleRow(SamplingParams(temperature=0.0), 0, [1], [50], frozenset({END}))
    bad, good = sample(GivenLogits(torch.eye(VOCAB)[:2]), [0, 1], [row, fine])
    assert isinstance(bad.error, VAttentionError)
    assert good.token_id == 1


@pytest.mark.parametrize("other", ["use_beam_search", "ignore_eos"])
def test_what_does_not_go_with_it(other: str) -> None:
    with pytest.raises(RequestError) as refusal:
        SamplingParams(grammar='start: "a"', **{other: True})  # type: ignore[arg-type]
    assert refusal.value.param == "grammar"
