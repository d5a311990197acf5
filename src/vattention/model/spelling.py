"""What a tokenizer's tokens are as bytes, and which tokens a text in the middle of another is.

Both are what llguidance's reader of tokenizer.json finds, but that one parses all of it, merges too, and holds
Python's lock meanwhile. Here the tokenizer that is loaded already is asked, token by token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from vattention.errors import RequestError

SPECIAL_MARK = b"\xff"
"""llguidance takes a token that begins with this byte, which no text has, for one that is no text."""

_BYTE_NAME_LENGTH = len("<0x00>")


def spellings(backend: Backend) -> list[bytes]:
    """The bytes of each token, by id; those of special tokens are their names behind `SPECIAL_MARK`.

    Raises:
        RequestError: the tokenizer's decoder does not say what bytes a token stands for.
    """
    spell = _speller(_surroundings(backend)["decoder"])
    found = [spell(name) if (name := backend.id_to_token(token)) else b"" for token in range(_vocab_size(backend))]
    for token, added in backend.get_added_tokens_decoder().items():
        name = added.content
        if added.special or (name.startswith("<") and name.endswith(">")):
            found[token] = SPECIAL_MARK + name.encode()
        elif not found[token]:
            found[token] = name.encode()
    return found


def inner_encoder(backend: Backend) -> Callable[[str], list[int]]:
    """Encodes text that goes on after other text: nothing is put before it."""
    around = _surroundings(backend)
    inner = {
        **around,
        "normalizer": _without_prepend(around["normalizer"]),
        "pre_tokenizer": _never_prepending(around["pre_tokenizer"]),
    }
    if inner != around:
        backend = _in_surroundings(backend, inner)

    def encode(text: str) -> list[int]:
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _vocab_size(backend: Backend) -> int:
    size: int = backend.get_vocab_size(with_added_tokens=True)
    return size


def _surroundings(backend: Backend) -> dict[str, Any]:
    """All but vocabulary and added tokens, as tokenizer.json has it."""
    shell = Backend(models.BPE())
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (value := getattr(backend, part)) is not None:
            setattr(shell, part, value)
    parsed: dict[str, Any] = json.loads(shell.to_str())
    return parsed


def _in_surroundings(backend: Backend, around: dict[str, Any]) -> Backend:
    """The same vocabulary, which is not copied, with other surroundings."""
    made = Backend.from_str(json.dumps(around))
    made.model = backend.model
    added = [token for _, token in sorted(backend.get_added_tokens_decoder().items())]
    for special, tokens in groupby(added, lambda token: bool(token.special)):
        _add(made, list(tokens), special=special)
    return made


def _add(backend: Backend, tokens: list[AddedToken], *, special: bool) -> None:
    if special:
        backend.add_special_tokens(tokens)
    else:
        backend.add_tokens(tokens)


def _steps(part: dict[str, Any] | None, kind: str) -> Iterator[dict[str, Any]]:
    """A part of a tokenizer, or the parts it is a sequence of."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for step in part[kind]:
            yield from _steps(step, kind)
    else:
        yield part


def _without_prepend(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    if normalizer is None or normalizer["type"] == "Prepend":
        return None
    if normalizer["type"] != "Sequence":
        return normalizer
    kept = [step for step in map(_without_prepend, normalizer["normalizers"]) if step is not None]
    return {**normalizer, "normalizers": kept} if kept else None


def _never_prepending(pre_tokenizer: dict[str, Any] | None) -> dict[str, Any] | None:
    if pre_tokenizer is None:
        return None
    match pre_tokenizer["type"]:
        case "Metaspace":
            return {**pre_tokenizer, "prepend_scheme": "never"}
        case "Sequence":
            steps = [_never_prepending(step) for step in pre_tokenizer["pretokenizers"]]
            return {**pre_tokenizer, "pretokenizers": steps}
        case _:
            return pre_tokenizer


def _speller(decoder: dict[str, Any] | None) -> Callable[[str], bytes]:
    steps = list(_steps(decoder, "decoders"))
    kinds = {step["type"] for step in steps}
    if "ByteFallback" in kinds:
        spaces = [
            step["pattern"]["String"]
            for step in steps
            if step["type"] == "Replace" and step["content"] == " " and len(step["pattern"].get("String", "")) == 1
        ]
        return _fallback_speller(spaces[-1] if spaces else " ")
    if "ByteLevel" in kinds:
        return _byte_level_speller()
    raise RequestError(
        "grammars need to know the bytes of each token, which this model's tokenizer does not say (its decoder is "
        "neither ByteLevel nor ByteFallback)",
        param="grammar",
    )


def _fallback_speller(space: str) -> Callable[[str], bytes]:
    """As SentencePiece writes tokens: text with a character for the space, or <0x0A>."""

    def spell(name: str) -> bytes:
        if len(name) == _BYTE_NAME_LENGTH and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        return name.replace(space, " ").encode()

    return spell


def _byte_level_speller() -> Callable[[str], bytes]:
    """As GPT-2 writes tokens: a visible character for each byte, the byte's own where it has one."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    byte_of = {chr(byte): byte for byte in own} | {chr(0x100 + i): byte for i, byte in enumerate(others)}

    def spell(name: str) -> bytes:
        """Nothing for a token that is no string of bytes."""
        return bytes(map(byte_of.__getitem__, name)) if byte_of.keys() >= set(name) else b""

    return spell
