"""What the APIs' request bodies have in common.

Every field of OpenAI's and vLLM's requests falls into one of three groups: it is honoured (a field of the model),
it changes nothing here and is let through (`ignored`), or it is refused by name unless its value asks for nothing
(`unsupported`). A field nobody knows is refused too, as OpenAI does: a misspelt one should not be lost silently.
null means the same as leaving a field out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NotRequired, TypedDict

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from vattention.structured_outputs import StructuredOutputsParams

MAX_SAMPLES = 128
"""Most samples of one prompt, as OpenAI's API has it."""

Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def invalid(param: str, message: str, *, kind: str = "value_error") -> PydanticCustomError:
    """A validation error about one field, for validators that look at several."""
    return PydanticCustomError(kind, message, {"param": param})


def check_unicode(text: str) -> str:
    """JSON can spell half of a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("value_error", "must be Unicode without lone surrogates") from error
    return text


def _check_token_ids(bias: dict[str, float]) -> dict[str, float]:
    wrong = next((name for name in bias if not re.fullmatch("[0-9]{1,10}", name)), None)
    if wrong is not None:
        raise invalid("logit_bias", "keys must be token ids")
    return bias


def _without_nulls(value: Any) -> Any:
    return {name: inner for name, inner in value.items() if inner is not None} if isinstance(value, dict) else value


Text = Annotated[str, AfterValidator(check_unicode)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Body(BaseModel):
    """A request body: strictly typed, and closed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    ignored: ClassVar[frozenset[str]] = frozenset()
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Field names, with the values that ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _sort_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if value is None or name in cls.ignored:
                continue
            if name not in cls.unsupported:
                kept[name] = value
            elif _without_nulls(value) not in cls.unsupported[name]:
                raise invalid(name, f"{name} is not supported by this server", kind="unsupported_parameter")
        return kept


class ModelBody(Body):
    """A body that may name the model; without it the one served is meant."""

    model: str | None = None


class StreamOptions(Body):
    """What else a stream reports."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"include_obfuscation": (False,)}

    include_usage: bool = False
    continuous_usage_stats: bool = False


class StructuredOutputs(Body):
    """vLLM's words for what a text has to be."""

    ignored: ClassVar[frozenset[str]] = frozenset({"disable_any_whitespace", "disable_fallback"})
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "disable_additional_properties": (False,),
        "structural_tag": (),
        "whitespace_pattern": (),
    }

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: Text | None = None
    choice: list[Text] | None = None
    grammar: Text | None = None
    json_object: bool | None = None


class NamedSchema(Body):
    """A JSON schema as OpenAI's API wraps it."""

    ignored: ClassVar[frozenset[str]] = frozenset({"description", "name", "strict"})

    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    """OpenAI's words for what a text has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise invalid("response_format", "json_schema must be there for the type json_schema, and for no other")
        return self


class SamplingBody(ModelBody):
    """Sampling and streaming, the same for completions and chat."""

    ignored: ClassVar[frozenset[str]] = frozenset({"user", "service_tier"})
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "guided_decoding_backend": (),
        "kv_transfer_params": (),
        "repetition_detection": (),
        "spaces_between_special_tokens": (True,),
        "truncate_prompt_tokens": (),
        "vllm_xargs": ({},),
    }

    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: Int64 | None = None
    stop: Annotated[list[Text], BeforeValidator(_as_list)] = Field(default_factory=list)
    stop_token_ids: list[TokenId] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    allowed_token_ids: list[TokenId] = Field(default_factory=list)
    bad_words: list[Text] = Field(default_factory=list)
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Annotated[dict[str, float], AfterValidator(_check_token_ids)] = Field(default_factory=dict)
    skip_special_tokens: bool = True
    best_of: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    prompt_logprobs: int | None = None
    priority: Int64 = 0
    cache_salt: Text = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    request_id: Annotated[Text, Field(max_length=256)] | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: Text | None = None
    guided_choice: list[Text] | None = None
    guided_grammar: Text | None = None

    _sampling_fields: ClassVar[tuple[str, ...]] = (
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "stop_token_ids",
        "include_stop_str_in_output",
        "ignore_eos",
        "allowed_token_ids",
        "bad_words",
        "min_tokens",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "skip_special_tokens",
        "best_of",
        "use_beam_search",
        "length_penalty",
        "prompt_logprobs",
    )

    @model_validator(mode="after")
    def _check_stream(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options needs stream=true")
        if self.stream and self.prompt_logprobs is not None:
            raise invalid("prompt_logprobs", "prompt_logprobs cannot be streamed")
        if self.stream and self.use_beam_search:
            raise invalid("stream", "a beam search cannot be streamed: which beam is best shows only at its end")
        if self.stream and self.best_of is not None and self.best_of > self.n:
            raise invalid("stream", "the best of more samples than n cannot be streamed: they show only at the end")
        return self

    @model_validator(mode="after")
    def _check_structure(self) -> SamplingBody:
        asked = [name for name, kinds in self._structures().items() if kinds]
        if len(asked) > 1:
            raise invalid(asked[1], f"cannot be combined with {asked[0]}: choose one of them")
        return self

    def _structures(self) -> dict[str, dict[str, Any]]:
        """What the text has to be by each field that may say so, as arguments of `StructuredOutputsParams`."""
        own, asked = self.structured_outputs, self.response_format
        given: dict[str, dict[str, Any]] = {
            "structured_outputs": {} if own is None else own.model_dump(exclude_none=True) or {"json_": None},
            "response_format": {},
        }
        if asked is not None and asked.type != "text":
            schema = {"type": "object"} if asked.json_schema is None else asked.json_schema.schema_
            given["response_format"] = {"json_": schema}
        for kind in ("json", "regex", "choice", "grammar"):
            value = getattr(self, f"guided_{kind}")
            given[f"guided_{kind}"] = {} if value is None else {kind: value}
        return {name: {kind.rstrip("_"): kinds[kind] for kind in kinds} for name, kinds in given.items()}

    def structure(self) -> StructuredOutputsParams | None:
        """What the text has to be; None for anything.

        Raises:
            RequestError: it cannot be what the client says.
        """
        kinds = next(filter(None, self._structures().values()), None)
        return None if kinds is None else StructuredOutputsParams(**kinds)

    def asked_sampling(self) -> dict[str, Any]:
        """Arguments for `SamplingParams`: only those that the client sent."""
        return {name: getattr(self, name) for name in self._sampling_fields if name in self.model_fields_set}

    @property
    def reports_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def reports_usage_always(self) -> bool:
        return self.reports_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    """Tokens of all prompts and all samples of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(TypedDict):
    """One alternative at one position of the prompt, as vLLM reports it."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
FinishReason = Literal["stop", "length", "tool_calls"]


class ChoiceExtras(TypedDict):
    """vLLM's additions to a choice."""

    stop_reason: int | str | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs | None]
