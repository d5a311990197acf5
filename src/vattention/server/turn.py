"""From a conversation to its next message's texts: what chat completions and responses have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from vattention.errors import RequestError
from vattention.outputs import RequestOutput
from vattention.sampling_params import SamplingParams
from vattention.server.generation import outputs_of
from vattention.server.protocol_chat import ChatCompletionRequest
from vattention.server.replies import PlainText, ReplyText, TextWithCalls
from vattention.server.service import Service
from vattention.server.tools import Function, forced_calls


class Turn:
    """One request.

    Attributes:
        texts: what reads each sample's text; to be used once `outputs` has been entered.
    """

    def __init__(self, service: Service, body: ChatCompletionRequest) -> None:
        self._service = service
        self._body = body
        self.texts: list[ReplyText] = [PlainText() for _ in range(body.n)]

    @asynccontextmanager
    async def outputs(self) -> AsyncIterator[AsyncIterator[tuple[int, RequestOutput]]]:
        """Check everything, and submit the conversation."""
        body, service = self._body, self._service
        params = service.sampling(
            body,
            max_tokens=body.token_limit,
            logprobs=body.top_logprobs if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
        )
        token_ids = await service.render(body)
        params = replace(params, stop=(*params.stop_strings, *service.chat_stop_strings()))
        if body.shown_tools:
            params = self._expect_calls(params)
        service.check_context(token_ids, body.token_limit, body.token_limit_param)
        submitted = outputs_of(
            service.engine, [token_ids], params, priority=body.priority, cache_salt=body.cache_salt
        )
        try:
            async with submitted as outputs:
                yield outputs
        except RequestError as error:
            if error.param != "grammar" or body.tool_choice.mode != "required":
                raise
            raise RequestError(f"calls of these tools cannot be forced: {error}", param="tools") from error

    def _expect_calls(self, params: SamplingParams) -> SamplingParams:
        """Look out for calls in all texts, and let them keep what marks one."""
        call_format = self._service.call_format()
        known = frozenset(tool.function.name for tool in self._body.tools)
        choice = self._body.tool_choice
        only_one = choice.name is not None or not self._body.parallel_tool_calls
        self.texts = [TextWithCalls(call_format, known, only_one=only_one) for _ in range(self._body.n)]
        special = self._service.special_among(call_format.markers)
        if special:
            params = replace(params, skip_special_tokens=False)
        if choice.mode == "required":
            if params.grammar is not None:
                raise RequestError("forces calls, so the text cannot be anything else besides", param="tool_choice")
            functions = [
                Function(tool.function.name, tool.function.parameters)
                for tool in self._body.tools
                if choice.name in (None, tool.function.name)
            ]
            params = replace(params, grammar=forced_calls(call_format, functions, special, only_one=only_one))
        return params
