from __future__ import annotations

from typing import Any

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from pydantic import ValidationError

from vattention.server.protocol import Body
from vattention.server.protocol_chat import ChatCompletionRequest
from vattention.server.protocol_completions import CompletionRequest

STREAM = {"stream"}
VLLM = {
    *("use_beam_search", "top_k", "min_p", "repetition_penalty", "length_penalty", "stop_token_ids"),
    *("include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens"),
    *("spaces_between_special_tokens", "truncate_prompt_tokens", "prompt_logprobs", "allowed_token_ids"),
    *("add_special_tokens", "response_format", "structured_outputs", "priority", "request_id"),
    *("return_tokens_as_token_ids", "return_token_ids", "cache_salt", "kv_transfer_params", "vllm_xargs"),
    *("repetition_detection", "echo"),
}
VLLM_CHAT = VLLM | {
    *("bad_words", "add_generation_prompt", "continue_final_message", "documents", "chat_template"),
    *("chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs", "include_reasoning"),
    *("thinking_token_budget", "return_prompt_text"),
}


def known(body: type[Body]) -> set[str]:
    return set(body.model_fields) | set(body.ignored) | set(body.unsupported)


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (CompletionRequest, set(completion_params.CompletionCreateParamsBase.__annotations__) | STREAM),
        (CompletionRequest, VLLM | {"prompt_embeds"}),
        (ChatCompletionRequest, set(chat_params.CompletionCreateParamsBase.__annotations__) | STREAM),
        (ChatCompletionRequest, VLLM_CHAT),
    ],
)
def test_every_field_of_openai_and_vllm_is_known(body: type[Body], fields: set[str]) -> None:
    assert fields <= known(body)


@pytest.mark.parametrize("body", [CompletionRequest, ChatCompletionRequest])
def test_a_field_is_either_honoured_or_ignored_or_refused(body: type[Body]) -> None:
    groups: list[set[str]] = [set(body.model_fields), set(body.ignored), set(body.unsupported)]
    assert sum(map(len, groups)) == len(set.union(*groups))


@pytest.mark.parametrize("body", [CompletionRequest, ChatCompletionRequest])
def test_an_unsupported_field_is_refused_unless_it_asks_for_nothing(body: type[Body]) -> None:
    base: dict[str, Any] = {"prompt": "a"}
    if body is ChatCompletionRequest:
        base = {"messages": [{"role": "user", "content": "a"}]}
    for name, trivial in body.unsupported.items():
        for value in (None, *trivial):
            body.model_validate({**base, name: value})
        with pytest.raises(ValidationError) as refusal:
            body.model_validate({**base, name: "surely not"})
        assert refusal.value.errors()[0]["ctx"] == {"param": name}


def test_null_means_the_default() -> None:
    nulls = dict.fromkeys(CompletionRequest.model_fields.keys() - {"prompt"})
    assert CompletionRequest.model_validate({"prompt": "a", **nulls}).asked_sampling() == {}
