from __future__ import annotations

import pytest

from tests.model.tiny import tiny_tokenizer
from vattention.engine.text import TextStream
from vattention.model.tokenizer import Tokenizer
from vattention.outputs import Logprob
from vattention.sampling_params import SamplingParams

TEXT = "héllo wörld 🙂, stop here and no further"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = tiny_tokenizer()
    return made if isinstance(made, Tokenizer) else Tokenizer(made)


def stream(tokenizer: Tokenizer, **options: object) -> tuple[TextStream, list[str], str | None]:
    """Feed TEXT token by token; the text after each, and the stop string that ended it."""
    text = TextStream(tokenizer, [], SamplingParams(**options))  # type: ignore[arg-type]
    seen = []
    for token in tokenizer.encode(TEXT, add_special_tokens=False):
        stop = text.add(token, may_stop=True)
        seen.append(text.text)
        if stop is not None:
            return text, seen, stop
    text.finish()
    return text, seen, None


def test_text_grows_by_whole_characters_to_the_whole(tokenizer: Tokenizer) -> None:
    text, seen, stop = stream(tokenizer)
    assert stop is None
    assert text.text == TEXT
    assert all(TEXT.startswith(part) for part in seen)


def test_a_stop_string_over_several_tokens_never_shows(tokenizer: Tokenizer) -> None:
    text, seen, stop = stream(tokenizer, stop=["stop here"])
    assert stop == "stop here"
    assert text.text == TEXT[: TEXT.index("stop here")]
    assert not any(part.endswith(("s", "st", "sto", "stop")) for part in seen)


def test_a_stop_string_can_be_kept(tokenizer: Tokenizer) -> None:
    text, _, _ = stream(tokenizer, stop="here", include_stop_str_in_output=True)
    assert text.text == TEXT[: TEXT.index("here") + 4]


def test_what_looked_like_a_stop_string_appears_at_the_end(tokenizer: Tokenizer) -> None:
    text, _, stop = stream(tokenizer, stop="further on")
    assert stop is None
    assert text.text == TEXT


def test_logprobs_get_their_tokens_text(tokenizer: Tokenizer) -> None:
    token = tokenizer.encode("a", add_special_tokens=False)[0]
    spelt = TextStream(tokenizer, [], SamplingParams()).spell_out({token: Logprob(-1.0, 2)})
    assert spelt == {token: Logprob(-1.0, 2, "a")}
