"""Against llguidance's own reader of tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from tests.model.tiny import CORPUS, byte_fallback, byte_level
from vattention.errors import RequestError
from vattention.model.grammar import Grammars
from vattention.model.spelling import SPECIAL_MARK, inner_encoder, spellings
from vattention.model.tokenizer import Tokenizer

END = 2
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "n": {"type": "integer"}},
    "required": ["name", "n"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
}


def metaspace() -> Backend:
    """Like T5's and newer Llamas': a space is a character of its own, and one is put before each text."""
    backend = byte_fallback().backend_tokenizer
    state = json.loads(backend.to_str())
    state["normalizer"] = None
    changed = Backend.from_str(json.dumps(state))
    changed.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    return changed


def with_added() -> Backend:
    """Tokens of each kind that are none of the model's vocabulary."""
    backend = Backend.from_str(byte_level().backend_tokenizer.to_str())
    backend.add_tokens(["plain words", "<tool>"])
    backend.add_special_tokens([AddedToken("[CALL]", special=True)])
    backend.add_tokens(["ärger"])
    return backend


def prepending_with_added() -> Backend:
    backend = Backend.from_str(byte_fallback().backend_tokenizer.to_str())
    backend.add_tokens([AddedToken(name, normalized=False) for name in ("plain words", "<tool>")])
    backend.add_special_tokens([AddedToken("[CALL]", special=True)])
    return backend


BACKENDS: list[Callable[[], Backend]] = [
    lambda: byte_level().backend_tokenizer,
    lambda: byte_fallback().backend_tokenizer,
    metaspace,
    with_added,
    prepending_with_added,
]
each = pytest.mark.parametrize("make", BACKENDS, ids=["byte_level", "fallback", "metaspace", "added", "prepending"])


@each
def test_bytes_of_each_token(make: Callable[[], Backend]) -> None:
    backend = make()
    found = spellings(backend)
    reference = LLTokenizer(backend.to_str())
    assert len(found) == reference.vocab_size
    for token, spelling in enumerate(found):
        assert spelling.startswith(SPECIAL_MARK) == reference.is_special_token(token)
        if not spelling.startswith(SPECIAL_MARK):
            assert spelling == reference.decode_bytes([token])


@each
def test_tokens_of_text_behind_other_text(make: Callable[[], Backend]) -> None:
    backend = make()
    encode = inner_encoder(backend)
    reference = LLTokenizer(backend.to_str())
    for text in (*CORPUS, "the", " the", "a</s>b", "<tool>plain words", "[CALL]ärger\n\n12"):
        assert encode(text) == reference.tokenize_str(text)


@each
@pytest.mark.parametrize(
    ("lark", "text"),
    [
        (f"start: %json {json.dumps(SCHEMA)}", '{"name": "the end", "n": 120}'),
        ('start: "the quick brown fox" | "the end" " of it"', "the end of it"),
        ("start: /[a-z ]+[0-9]{2}/", "hello there12"),
        ('start: "hello " <[3]> " there"', "hello <|user|> there"),
        ("start: <[3]> /.*/", "<|user|>x"),
        ('start: "日本" /.*/', "日本語"),
    ],
)
def test_masks_are_the_same(make: Callable[[], Backend], lark: str, text: str) -> None:
    backend = make()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    vocabularies = (
        Grammars(tokenizer, frozenset({END, 1})).read_vocabulary(),
        LLTokenizer(backend.to_str(), eos_token=[1, END]),
    )
    assert vocabularies[0].eos_tokens == vocabularies[1].eos_tokens
    matchers = [LLMatcher(one, LLMatcher.grammar_from_lark(lark), log_level=0) for one in vocabularies]
    ids = inner_encoder(backend)(text)
    for token in [*ids, END]:
        mine, reference = (matcher.compute_bitmask() for matcher in matchers)
        assert mine == reference
        assert mine[token // 8] >> token % 8 & 1
        for matcher in matchers:
            assert token == END or matcher.consume_tokens([token])


def test_a_decoder_that_says_nothing_of_bytes() -> None:
    backend = Backend(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.decoder = decoders.WordPiece()
    tokenizer: Any = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    with pytest.raises(RequestError, match="ByteFallback") as refusal:
        Grammars(tokenizer, frozenset()).grammar('start: "a"')
    assert refusal.value.param == "grammar"
