"""Text to token ids and back: a Hugging Face fast tokenizer, safe to use from several threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerBase

from vattention.errors import ConfigError
from vattention.model.chat_template import ChatTemplate


class Tokenizer:
    """Wraps a transformers tokenizer.

    Encoding and decoding go to the library below transformers, whose read-only calls may run in parallel: those of
    transformers set truncation and padding on the way, and fail with "Already borrowed" beside another thread.
    Decoded text is what the tokens say: no spaces are cleaned up afterwards, which a stream could not take back.

    Attributes:
        original: the one that it wraps.

    Raises:
        ConfigError: the tokenizer is one of transformers' slow ones.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                f"{type(tokenizer).__name__} has no fast version (no tokenizer.json): name another with "
                "tokenizer=, or serve token ids with skip_tokenizer_init=True"
            )
        self.original = tokenizer
        self._backend: Backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._chat = ChatTemplate(tokenizer)
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self._anchor = self._backend.encode("a", add_special_tokens=False).ids[-1:]
        self._anchor_text = self.decode(self._anchor)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id; found out when it is first asked for, which takes a while."""
        largest: int = max(self._backend.get_vocab(with_added_tokens=True).values())
        return largest + 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with what the tokenizer puts around it, such as a BOS token."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary nothing."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """One token as text, with its leading space; a part of a character shows as U+FFFD."""
        # After another token, since many tokenizers drop a space at the very beginning.
        return self.decode([*self._anchor, token_id], skip_special_tokens=False)[len(self._anchor_text) :]

    @property
    def backend(self) -> Backend:
        """What is below transformers, without truncation and padding; not to be changed."""
        return self._backend

    @property
    def has_chat_template(self) -> bool:
        """Whether the model brings a chat template of its own."""
        return self._chat.is_models_own

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation; a template writes its BOS token itself, and no second one is added.

        Args:
            messages: OpenAI's: mappings with "role" and "content", which is a text or a list of text parts.
            template: a Jinja template in place of the model's; a model without one gets a plain built-in one.
            add_generation_prompt: end with what opens the assistant's turn.
            continue_final_message: leave the last message open, to be continued.
            tools: JSON schemas of functions, for templates that take them.
            variables: further variables of the template.

        Raises:
            RequestError: the messages are malformed, or the template refuses them.
        """
        text = self._chat.render(
            messages,
            template=template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables=variables,
        )
        return self.encode(text, add_special_tokens=False)

    def chat_template_source(self, template: str | None = None, *, with_tools: bool = False) -> str:
        """The Jinja template that `apply_chat_template` uses: models may bring one of their own for tools.

        Raises:
            RequestError: the model brings several, and none of them is for this.
        """
        return self._chat.source(template, with_tools=with_tools)

    def chat_stop_strings(self, template: str | None = None) -> tuple[str, ...]:
        """Strings that end the assistant's turn where no end token does: those of the built-in template."""
        return self._chat.stop_strings(template)
