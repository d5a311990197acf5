from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.tiny import byte_fallback, byte_level
from vattention.model.detokenizer import CONTEXT_TOKENS, WINDOW_TOKENS, Detokenizer
from vattention.model.tokenizer import Tokenizer

TOKENIZERS = {"byte_level": Tokenizer(byte_level()), "byte_fallback": Tokenizer(byte_fallback())}

kinds = pytest.mark.parametrize("kind", list(TOKENIZERS))

texts = st.text(
    st.one_of(
        st.sampled_from("abc the,é日本語🎉👨\u200d👩 \n"),
        st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd▁"),
    ),
    max_size=60,
)


def stream(tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int], skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    return [*(detokenizer.add([token]) for token in output), detokenizer.flush()]


@kinds
@settings(max_examples=300, deadline=None)
@given(prompt=texts, text=texts)
def test_the_pieces_of_a_text_are_the_text(kind: str, prompt: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    before, after = tokenizer.encode(prompt), tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, before, after)
    whole = tokenizer.decode([*before, *after])
    assert "".join(pieces) == whole[len(tokenizer.decode(before)) :]
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=500, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 360), max_size=20),
    output=st.lists(st.one_of(st.integers(0, 360), st.integers(100, 230)), max_size=80),
    skip=st.booleans(),
)
def test_random_bytes_come_out_as_decoded_at_once(prompt: list[int], output: list[int], skip: bool) -> None:
    """With tokens that are bytes, invalid UTF-8 included. The prompt ends in a whole character."""
    tokenizer = TOKENIZERS["byte_level"]
    prompt = [*prompt, *tokenizer.encode(" the", add_special_tokens=False)]
    whole = tokenizer.decode([*prompt, *output], skip)
    assert "".join(stream(tokenizer, prompt, output, skip)) == whole[len(tokenizer.decode(prompt, skip)) :]


@settings(max_examples=300, deadline=None)
@given(output=st.lists(st.integers(0, 349), max_size=80))
def test_random_tokens_with_byte_fallback(output: list[int]) -> None:
    """A run of bytes is all or nothing to this decoder, so only what is no invalid byte can be compared."""
    tokenizer = TOKENIZERS["byte_fallback"]
    streamed = "".join(stream(tokenizer, [297], output))
    whole = tokenizer.decode([297, *output])[len(tokenizer.decode([297])) :]
    if "\ufffd" not in whole:
        assert streamed == whole

    def ascii_of(text: str) -> str:
        return "".join(c for c in text if " " < c < "\x7f")

    # Each letter of the whole text is there: what is replaced is never more than invalid runs.
    rest = iter(ascii_of(streamed))
    assert all(letter in rest for letter in ascii_of(whole))


@kinds
def test_characters_come_whole_and_at_once(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    tokens = tokenizer.encode("🎉🎊", add_special_tokens=False)
    start = len(tokens) - 8
    pieces = stream(tokenizer, tokenizer.encode("hello"), tokens)
    assert [piece for piece in pieces[start:] if piece.strip()] == ["🎉", "🎊"]
    assert pieces[start + 3].strip() == "🎉"
    assert pieces[start + 7] == "🎊"


@kinds
def test_several_tokens_at_once(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    tokens = tokenizer.encode(" the end 🎉", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("hello"))
    assert (detokenizer.add(tokens) + detokenizer.flush()).strip() == "the end 🎉"
    assert detokenizer.flush() == ""


@kinds
def test_a_character_that_stays_incomplete(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    tokens = tokenizer.encode("a🎉", add_special_tokens=False)[:-1]
    *pieces, last = stream(tokenizer, tokenizer.encode("hello"), tokens)
    assert "\ufffd" not in "".join(pieces)
    assert "\ufffd" in last


@kinds
def test_an_endless_run_of_invalid_bytes_flows(kind: str) -> None:
    """A model caught in a loop of half characters must neither fall silent nor become slow."""
    tokenizer = TOKENIZERS[kind]
    half = tokenizer.encode("🎉", add_special_tokens=False)[-4]
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("hello"))
    pieces = [detokenizer.add([half]) for _ in range(500)]
    assert 490 <= len("".join(pieces)) <= 500
    assert len(detokenizer._window) <= 2 * WINDOW_TOKENS + 1


@kinds
def test_the_window_stays_short(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("hello"))
    longest = 0
    for token in tokenizer.encode("the quick brown fox 🎉🎊 jumps. " * 100, add_special_tokens=False):
        detokenizer.add([token])
        longest = max(longest, len(detokenizer._window))
    assert longest <= WINDOW_TOKENS + CONTEXT_TOKENS


@kinds
def test_special_tokens(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    tokens = [*tokenizer.encode(" the", add_special_tokens=False), 3, *tokenizer.encode(" end", False), 2]
    prompt = tokenizer.encode("hello")
    shown, hidden = ("".join(stream(tokenizer, prompt, tokens, skip)) for skip in (False, True))
    assert shown.rstrip().endswith("</s>")
    assert "<|user|>" in shown
    assert hidden == shown.replace("</s>", "").replace("<|user|>", "")
