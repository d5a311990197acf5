from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import PreTrainedTokenizerBase

from tests.model.tiny import byte_fallback, byte_level
from vattention.errors import ConfigError
from vattention.model.tokenizer import Tokenizer

TEXT = "hello world, naïve 🎉 日本"


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_there_and_back(make: type[PreTrainedTokenizerBase]) -> None:
    theirs = make()
    ours = Tokenizer(theirs)
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    assert ours.encode(TEXT)[0] == ours.bos_token_id
    assert ours.encode(TEXT, add_special_tokens=False) == ours.encode(TEXT)[1:]
    assert ours.decode(ours.encode(TEXT)) == TEXT
    assert ours.decode(ours.encode(TEXT), skip_special_tokens=False).startswith("<s>")
    assert ours.eos_token_id == 2
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_token_text_keeps_leading_spaces(make: type[PreTrainedTokenizerBase]) -> None:
    tokenizer = Tokenizer(make())
    ids = tokenizer.encode("the hello", add_special_tokens=False)
    assert "".join(tokenizer.token_text(token) for token in ids).strip() == "the hello"
    assert any(tokenizer.token_text(token).startswith(" ") for token in ids)
    assert tokenizer.token_text(2) == "</s>"


def test_part_of_a_character_shows_as_a_replacement() -> None:
    tokenizer = Tokenizer(byte_level())
    assert {tokenizer.token_text(token) for token in tokenizer.encode("🎉", add_special_tokens=False)} == {"\ufffd"}


def test_settings_of_the_file_do_not_cut_or_pad() -> None:
    theirs = byte_level()
    theirs.backend_tokenizer.enable_truncation(2)
    theirs.backend_tokenizer.enable_padding(length=50)
    assert len(Tokenizer(theirs).encode("the quick brown fox")) == 5


def test_threads_do_not_disturb_each_other() -> None:
    tokenizer = Tokenizer(byte_level())
    texts = [f"{TEXT} {i} " * 50 for i in range(8)]
    expected = [tokenizer.encode(text) for text in texts]
    start = threading.Barrier(8)

    def work(i: int) -> bool:
        start.wait()
        messages = [{"role": "user", "content": texts[i]}]
        return all(
            tokenizer.encode(texts[i]) == expected[i]
            and tokenizer.decode(expected[i]) == texts[i]
            and len(tokenizer.apply_chat_template(messages)) > len(expected[i])
            for _ in range(20)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match=r"Slow.*skip_tokenizer_init"):
        Tokenizer(Slow())
