"""What the routes share: the engine under its public name, and the way from a request to prompt and parameters."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TypeVar

from vattention.errors import ContextLengthError, RequestError
from vattention.sampling_params import SamplingParams
from vattention.server.engine import ServedEngine, TextTokenizer
from vattention.server.errors import MODEL_NOT_FOUND
from vattention.server.protocol import SamplingBody
from vattention.server.protocol_chat import Conversation
from vattention.server.tools import CallFormat, format_names, format_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Service:
    """One served model.

    Attributes:
        model_name: what clients call it.
        chat_template: a Jinja template in place of the model's own.
        own_call_format: how the model writes calls of functions, in place of what its chat template shows.
        worker: runs the tokenizer, so that a long prompt does not hold up the others' streams.
        created: when it began to serve, in Unix seconds.
    """

    engine: ServedEngine
    model_name: str
    chat_template: str | None
    own_call_format: CallFormat | None
    worker: Executor
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> TextTokenizer:
        """Raises:
        RequestError: the engine serves token ids only.
        """
        if self.engine.tokenizer is None:
            raise RequestError("this server has no tokenizer: it completes token ids only", param="prompt")
        return self.engine.tokenizer

    def check_model(self, name: str | None) -> None:
        """Raises:
        RequestError: a model of that name is not served here.
        """
        if name not in (None, self.model_name):
            raise RequestError(
                f"there is no model {name!r} here; this server has {self.model_name!r}",
                param="model",
                code=MODEL_NOT_FOUND,
            )

    def check_context(self, token_ids: Sequence[int], max_tokens: int | None, param: str) -> None:
        """Raises:
        ContextLengthError: prompt and `max_tokens`, which the client sent as `param`, exceed the context.
        """
        limit = self.engine.max_model_len
        if max_tokens is not None and len(token_ids) < limit < len(token_ids) + max_tokens:
            raise ContextLengthError(
                f"the prompt has {len(token_ids):,} tokens and {param} asks for {max_tokens:,} more, but this "
                f"model's context is {limit:,} tokens; shorten the prompt or ask for fewer",
                param=param,
            )

    def check_count(self, num_prompts: int) -> None:
        """Raises:
        RequestError: so many prompts would not fit into an empty queue either, however often they are sent.
        """
        config = self.engine.config
        most = config.max_num_seqs + config.max_queue
        if num_prompts > most:
            raise RequestError(
                f"a request of {num_prompts:,} prompts is more than run and wait at a time, which is {most:,} "
                f"(max_num_seqs={config.max_num_seqs}, max_queue={config.max_queue}): send fewer, raise max_queue",
                param="prompt",
            )

    async def in_worker(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.worker, work)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        tokenizer = self.tokenizer
        return await self.in_worker(lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens))

    async def render(self, conversation: Conversation) -> list[int]:
        """The conversation as a prompt, through the chat template.

        Raises:
            RequestError: the template refuses it, or would leave functions or calls out; or there is no tokenizer.
        """
        tokenizer = self.tokenizer
        messages = [message.for_template() for message in conversation.messages]
        tools = [tool.for_template() for tool in conversation.shown_tools]
        self._check_shown("tools", tools, with_tools=bool(tools), param="tools")
        calls = [message for message in messages if "tool_calls" in message]
        self._check_shown("tool_calls", calls, with_tools=bool(tools), param="messages")
        return await self.in_worker(
            lambda: tokenizer.apply_chat_template(
                messages,
                template=self.chat_template,
                add_generation_prompt=conversation.opens_reply,
                continue_final_message=conversation.continue_final_message,
                tools=tools or None,
                **conversation.chat_template_kwargs,
            )
        )

    def _check_shown(self, name: str, values: Sequence[object], *, with_tools: bool, param: str) -> None:
        source = self.tokenizer.chat_template_source(self.chat_template, with_tools=with_tools)
        if values and not re.search(rf"\b{name}\b", source):
            raise RequestError(
                f"this model's chat template leaves {name} out, so the model would not learn of them; start the "
                "server with one that shows them: --chat-template FILE",
                param=param,
            )

    def call_format(self) -> CallFormat:
        """How the model writes calls of functions.

        Raises:
            RequestError: its chat template does not show it.
        """
        source = self.tokenizer.chat_template_source(self.chat_template, with_tools=True)
        found = self.own_call_format or format_of(source)
        if found is None:
            raise RequestError(
                "this model's chat template writes calls of functions in no format that this server knows; "
                f"start it with --tool-call-parser ({format_names()}) if you know which it is",
                param="tools",
            )
        return found

    def special_among(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Those that are special tokens, which generated text leaves out, with their ids."""
        tokenizer = self.tokenizer
        encoded = {text: tokenizer.encode(text, add_special_tokens=False) for text in texts}
        return {text: ids for text, ids in encoded.items() if text not in tokenizer.decode(ids)}

    def chat_stop_strings(self) -> tuple[str, ...]:
        """Strings that end a reply where the chat template has no end token for it."""
        return self.tokenizer.chat_stop_strings(self.chat_template)

    def sampling(
        self, body: SamplingBody, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """What the client asked for, and the model's recommended values elsewhere.

        Raises:
            RequestError: a value is out of range.
        """
        values = {**self.engine.default_sampling, **body.asked_sampling()}
        values |= {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
        if max_tokens is not None or "max_tokens" not in values:
            values["max_tokens"] = max_tokens
        return SamplingParams(**values, structured_outputs=body.structure())


def response_id(prefix: str, body: SamplingBody) -> str:
    return f"{prefix}-{body.request_id or uuid.uuid4().hex}"
