"""`LLM`: offline generation with vLLM's interface."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from tqdm.auto import tqdm

from vattention.config import EngineConfig
from vattention.core import Prompt
from vattention.engine.engine import LLMEngine
from vattention.errors import ConfigError, RequestError
from vattention.model.tokenizer import Tokenizer
from vattention.outputs import RequestOutput
from vattention.sampling_params import SamplingParams

_OPTIONS = {field.name for field in dataclasses.fields(EngineConfig)}


class LLM:
    """A model ready to generate.

    >>> from vattention import LLM, SamplingParams
    >>> llm = LLM("demo")
    >>> outputs = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=8))
    >>> outputs[0].outputs[0].text

    Args:
        model: "demo", a Hugging Face id, a local folder, or a GGUF file.
        tokenizer: a Hugging Face id or folder; the model's own by default.
        options: the other attributes of `EngineConfig`, such as dtype, max_model_len, max_num_seqs or kv_memory.
            Arguments of vLLM's that are not there are refused by name.

    Raises:
        ConfigError, UnsupportedModelError: as their messages say.
    """

    def __init__(self, model: str, tokenizer: str | None = None, **options: Any) -> None:
        unknown = sorted(set(options) - _OPTIONS)
        if unknown:
            raise ConfigError(f"LLM has no argument {unknown[0]!r}; it takes {', '.join(sorted(_OPTIONS))}")
        self.engine = LLMEngine.from_config(EngineConfig(model=model, tokenizer=tokenizer, **options))
        self._ids = itertools.count()
        # The model and the mapper's thread hold on to the cache: without this it would outlive the last reference.
        self._close = weakref.finalize(self, self.engine.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ConfigError: the engine runs without one.
        """
        if self.engine.tokenizer is None:
            raise ConfigError("this LLM runs without a tokenizer (skip_tokenizer_init)")
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's makers recommend in generation_config.json."""
        return SamplingParams(**self.engine.default_sampling)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, as many at the same time as fit.

        Args:
            prompts: texts, {"prompt": text} or {"prompt_token_ids": [...]}; one or many.
            sampling_params: one for all prompts, or one each; the model's recommended ones by default.
            priority: one number per prompt; smaller goes first.

        Returns:
            One output per prompt, in the order of the prompts. One that failed has finish_reason "error" and its
            `error`; the others are not affected.

        Raises:
            RequestError: a prompt or its parameters are invalid; nothing was computed.
        """
        many: Sequence[Prompt] = [prompts] if isinstance(prompts, str | Mapping) else prompts
        params = self._params(sampling_params, len(many))
        priorities = list(priority) if priority is not None else [0] * len(many)
        if len(priorities) != len(many):
            raise RequestError(f"{len(many)} prompts, but {len(priorities)} priorities", param="priority")
        requests = [
            self.engine.prepare(str(next(self._ids)), prompt, own, rank)
            for prompt, own, rank in zip(many, params, priorities, strict=True)
        ]
        for request in requests:
            self.engine.start(request)
        outputs: dict[str, RequestOutput] = {}
        try:
            with tqdm(total=len(requests), desc="Requests", disable=not use_tqdm) as bar:
                while self.engine.has_unfinished_requests():
                    for output in self.engine.step():
                        if output.finished:
                            outputs[output.request_id] = output
                            bar.update()
        finally:
            for request in requests:
                self.engine.abort(request.id)
        return [outputs[request.id] for request in requests]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[RequestOutput]:
        """Reply to one conversation, or to a list of them; arguments and errors as for `generate`."""
        many: list[Any] = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        tokenizer = self.get_tokenizer()
        prompts: list[Prompt] = [
            {
                "prompt_token_ids": tokenizer.apply_chat_template(
                    conversation,
                    template=chat_template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                )
            }
            for conversation in many
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def close(self) -> None:
        """Give all memory back, as happens by itself with the last reference; nothing works afterwards."""
        self._close()

    def _params(self, params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        many = [params] * count if isinstance(params, SamplingParams) else list(params)
        if len(many) != count:
            raise RequestError(f"{count} prompts, but {len(many)} sampling_params", param="sampling_params")
        return many
