from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vattention.model.stop import StopChecker

words = st.text("abc", min_size=1, max_size=4)


def feed(pieces: list[str], stops: list[str], include: bool = False) -> tuple[list[str], str | None]:
    checker = StopChecker(stops, include)
    shown = [checker.add(piece) for piece in pieces]
    return [*shown, checker.flush()], checker.found


def reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Letter by letter over the whole text."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            stop = max(ended, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(st.lists(st.text("abc", max_size=5), max_size=12), st.lists(words, max_size=4), st.booleans())
def test_pieces_make_no_difference(pieces: list[str], stops: list[str], include: bool) -> None:
    shown, found = feed(pieces, stops, include)
    assert ("".join(shown), found) == reference("".join(pieces), stops, include)


@given(st.lists(st.text("abc", max_size=5), max_size=12), st.lists(words, min_size=1, max_size=3))
def test_only_a_beginning_of_a_stop_string_is_held_back(pieces: list[str], stops: list[str]) -> None:
    checker = StopChecker(stops)
    text = shown = ""
    for piece in pieces:
        text += piece
        shown += checker.add(piece)
        if checker.found is None:
            held = text.removeprefix(shown)
            assert shown + held == text
            assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_text_is_held_back_only_as_long_as_needed() -> None:
    checker = StopChecker(["\nUser:"])
    assert checker.add("Hi\nUs") == "Hi"
    assert checker.add("e it") == "\nUse it"
    assert checker.add("!\nUser") == "!"
    assert checker.add(": me") == ""
    assert checker.found == "\nUser:"
    assert checker.add("more") == ""
    assert checker.flush() == ""


def test_include_keeps_the_stop_string() -> None:
    assert feed(["one EN", "D two"], ["END"], include=True) == (["one ", "END", ""], "END")


def test_without_stop_strings_nothing_is_held() -> None:
    assert feed(["a", "b"], []) == (["a", "b", ""], None)


def test_passing_by_ignores_stop_strings() -> None:
    checker = StopChecker(["END"])
    assert checker.pass_by("the END") == "the END"
    assert checker.add("E") == ""
    assert checker.pass_by("ND") == "END"
    assert checker.found is None
    assert checker.add("END") == ""
    assert checker.found == "END"
