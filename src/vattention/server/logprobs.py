"""Logprobs in the shapes of the two APIs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vattention.outputs import Logprob, TokenLogprobs
from vattention.server.engine import TextTokenizer
from vattention.server.protocol import PromptLogprobs
from vattention.server.protocol_chat import ChatLogprob, ChatLogprobs
from vattention.server.protocol_completions import CompletionLogprobs

LOWEST = -9999.0
"""Stands for minus infinity, which JSON has not."""

_REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class TokenNames:
    """How logprobs write tokens: as text, or as "token_id:<id>" where asked to or without a tokenizer."""

    tokenizer: TextTokenizer | None
    as_ids: bool

    def __call__(self, token_id: int) -> str:
        if self.as_ids or self.tokenizer is None:
            return f"token_id:{token_id}"
        return self.tokenizer.token_text(token_id)

    def num_chars(self, token_id: int, *, skip_special_tokens: bool) -> int:
        """Characters it adds to the text; a character split over tokens counts with each of them."""
        if self.tokenizer is None:
            return 0
        text = self.tokenizer.token_text(token_id)
        hidden = skip_special_tokens and text.strip() and not self.tokenizer.decode([token_id]).strip()
        return 0 if hidden else len(text)


def chat_logprobs(
    token_ids: Sequence[int], entries: Sequence[TokenLogprobs], num_top: int, names: TokenNames
) -> ChatLogprobs:
    """Each token with its `num_top` likeliest alternatives."""
    return {
        "content": [
            {
                **_chat_logprob(token_id, entry[token_id], names),
                "top_logprobs": [
                    _chat_logprob(other, logprob, names) for other, logprob in _likeliest(entry)[:num_top]
                ],
            }
            for token_id, entry in zip(token_ids, entries, strict=True)
        ],
        "refusal": None,
    }


def _chat_logprob(token_id: int, logprob: Logprob, names: TokenNames) -> ChatLogprob:
    name = names(token_id)
    return {
        "token": name,
        "logprob": max(logprob.logprob, LOWEST),
        "bytes": None if _REPLACEMENT in name else list(name.encode()),
    }


def completion_logprobs(
    token_ids: Sequence[int],
    entries: Sequence[TokenLogprobs | None],
    num_top: int,
    names: TokenNames,
    *,
    offset: int,
    skip_special_tokens: bool,
) -> tuple[CompletionLogprobs, int]:
    """Tokens with their alternatives, the chosen one always among them; and the text offset after them.

    Args:
        entries: one per token; None for a prompt's first token, which nothing foretold.
        offset: characters of the choice's text before the first of these tokens.
    """
    report: CompletionLogprobs = {
        "text_offset": [],
        "token_logprobs": [],
        "tokens": [],
        "top_logprobs": [] if num_top else None,
    }
    for token_id, entry in zip(token_ids, entries, strict=True):
        report["text_offset"].append(offset)
        report["tokens"].append(names(token_id))
        report["token_logprobs"].append(None if entry is None else max(entry[token_id].logprob, LOWEST))
        if report["top_logprobs"] is not None:
            report["top_logprobs"].append(None if entry is None else _by_name(entry, names))
        offset += names.num_chars(token_id, skip_special_tokens=skip_special_tokens)
    return report, offset


def _by_name(entry: TokenLogprobs, names: TokenNames) -> dict[str, float]:
    """Where two tokens have the same text, the likelier one counts."""
    return {names(token_id): max(logprob.logprob, LOWEST) for token_id, logprob in reversed(_likeliest(entry))}


def prompt_logprobs(entries: Sequence[TokenLogprobs | None], names: TokenNames) -> PromptLogprobs:
    """As vLLM reports them: token id to logprob, rank and text."""
    return [
        None
        if entry is None
        else {
            str(token_id): {
                "logprob": max(logprob.logprob, LOWEST),
                "rank": logprob.rank,
                "decoded_token": names(token_id),
            }
            for token_id, logprob in entry.items()
        }
        for entry in entries
    ]


def _likeliest(entry: TokenLogprobs) -> list[tuple[int, Logprob]]:
    return sorted(entry.items(), key=lambda item: -item[1].logprob)
