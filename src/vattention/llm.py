"""`LLM`: offline generation with vLLM's interface."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm.auto import tqdm

from vattention import vllm_options
from vattention.config import EngineConfig
from vattention.core import Prompt
from vattention.engine.engine import LLMEngine
from vattention.errors import ConfigError, RequestError
from vattention.garbage import loading
from vattention.interrupts import held_interrupts
from vattention.model.tokenizer import Tokenizer
from vattention.outputs import BeamSearchOutput, BeamSearchSequence, RequestOutput
from vattention.sampling_params import BeamSearchParams, SamplingParams

_OPTIONS = {field.name for field in dataclasses.fields(EngineConfig)}


class LLM:
    """A model ready to generate. Calls from several threads take turns; a call that Ctrl-C ends leaves it ready for
    the next one.

    >>> from vattention import LLM, SamplingParams
    >>> llm = LLM("demo")
    >>> outputs = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=8))
    >>> outputs[0].outputs[0].text

    Args:
        model: "demo", a Hugging Face id, a local folder, or a GGUF file.
        tokenizer: a Hugging Face id or folder; the model's own by default.
        options: the other attributes of `EngineConfig`, such as dtype, max_model_len, max_num_seqs or kv_memory.
            None is the same as leaving one out. Arguments of vLLM's that are not there are refused by name, unless
            their values ask for nothing, such as tensor_parallel_size=1.

    Raises:
        ConfigError, UnsupportedModelError: as their messages say.
    """

    def __init__(self, model: str, tokenizer: str | None = None, **options: Any) -> None:
        config = EngineConfig(model=model, tokenizer=tokenizer, **vllm_options.known(options, _OPTIONS))
        with loading():
            self.engine = LLMEngine.from_config(config)
        self._ids = itertools.count()
        self._turn = threading.RLock()
        # The model and the mapper's thread hold on to the cache: without this it would outlive the last reference.
        self._close = weakref.finalize(self, self.engine.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get_tokenizer(self) -> Any:
        """The model's tokenizer, as transformers has it.

        Raises:
            ConfigError: the engine runs without one.
        """
        return self._tokenizer().original

    def _tokenizer(self) -> Tokenizer:
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
            prompts: texts, token ids, {"prompt": text} or {"prompt_token_ids": [...]}; one or many.
            sampling_params: one for all prompts, or one each; the model's recommended ones by default.
            priority: one number per prompt; smaller goes first.

        Returns:
            One output per prompt, in the order of the prompts. One that failed has finish_reason "error" and its
            `error`; the others are not affected.

        Raises:
            RequestError: a prompt or its parameters are invalid; nothing was computed.
        """
        many = _listed(prompts)
        params = self._params(sampling_params, len(many))
        priorities = list(priority) if priority is not None else [0] * len(many)
        if len(priorities) != len(many):
            raise RequestError(f"{len(many)} prompts, but {len(priorities)} priorities", param="priority")
        requests = [
            self.engine.prepare(str(next(self._ids)), prompt, own, rank)
            for prompt, own, rank in zip(many, params, priorities, strict=True)
        ]
        with self._turn, held_interrupts() as let_through:
            for request in requests:
                self.engine.start(request)
            return self._finish([request.id for request in requests], use_tqdm, let_through)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Reply to one conversation, or to a list of them; arguments and errors as for `generate`.

        Args:
            chat_template: a Jinja template in place of the model's own.
            add_generation_prompt: end the prompt with what opens the assistant's turn.
            continue_final_message: leave the last message open, to be continued.
            tools: JSON schemas of functions, for templates that take them.
            chat_template_kwargs: further variables of the template, such as {"enable_thinking": False}.
        """
        if isinstance(messages, str):
            raise RequestError('messages are mappings, such as {"role": "user", "content": text}', param="messages")
        many: list[Any] = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        tokenizer = self._tokenizer()
        prompts: list[Prompt] = [
            {
                "prompt_token_ids": tokenizer.apply_chat_template(
                    conversation,
                    template=chat_template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tools=tools,
                    **(chat_template_kwargs or {}),
                )
            }
            for conversation in many
        ]
        stops = tokenizer.chat_stop_strings(chat_template)
        params = [
            dataclasses.replace(own, stop=(*own.stop_strings, *stops))
            for own in self._params(sampling_params, len(many))
        ]
        return self.generate(prompts, params, use_tqdm=use_tqdm)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """Search for each prompt's `beam_width` likeliest continuations; beams share the memory of what they share.

        `generate` does the same with `SamplingParams(use_beam_search=True, beam_width=...)`, and does not raise for
        a search that failed.

        Returns:
            One output per prompt, in the order of the prompts, with its sequences best first.

        Raises:
            RequestError: a prompt or a parameter is invalid; nothing was computed.
            Exception: whatever a search failed of, such as too little memory.
        """
        outputs = self.generate(prompts, params.sampling(), use_tqdm=use_tqdm)
        failed = next((output.error for output in outputs if output.error is not None), None)
        if failed is not None:
            raise failed
        return [self._found(output) for output in outputs]

    def _found(self, output: RequestOutput) -> BeamSearchOutput:
        prompt, tokenizer = output.prompt, self.engine.tokenizer
        if prompt is None and tokenizer is not None:
            prompt = tokenizer.decode(output.prompt_token_ids)
        return BeamSearchOutput(
            [
                BeamSearchSequence(
                    tokens=[*output.prompt_token_ids, *sample.token_ids],
                    logprobs=sample.logprobs or [],
                    cum_logprob=sample.cumulative_logprob or 0.0,
                    text=None if prompt is None or tokenizer is None else prompt + sample.text,
                    finish_reason=sample.finish_reason,
                    stop_reason=sample.stop_reason,
                )
                for sample in output.outputs
            ]
        )

    def suspend(self, conversation: RequestOutput | str, path: str | Path, *, cache_salt: str = "") -> None:
        """Write a conversation to a file, from which this or another process with the same model can `resume` it.

        Args:
            conversation: what `generate` or `chat` returned; or the id of a request that was added to
                `self.engine` and is still running, which ends here.
            path: a file that is there already is replaced once the new one is complete.
            cache_salt: the one that a finished conversation's prompt came with.

        The keys and values of a finished conversation are saved as far as the prefix cache still has them
        (enable_prefix_caching), of the rest the tokens only, to be computed with the next prompt.

        Raises:
            RequestError: no such request runs.
            OSError, DriverError: the file cannot be written; nothing has changed.
        """
        with self._turn:
            if isinstance(conversation, str):
                self.engine.suspend(conversation, path)
            else:
                self.engine.suspend_finished(conversation, path, cache_salt)

    def resume(self, path: str | Path, *, use_tqdm: bool = True) -> RequestOutput:
        """Take in a file that `suspend` wrote.

        Returns:
            A finished conversation as it was: the next prompt that goes on from it computes only what is new, with
            enable_prefix_caching. One that was still running goes on to its end first, with the tokens it would
            have had without a break.

        Raises:
            RequestError: the file is damaged, of another model, or too long for this one's context.
            OSError: it cannot be read.
        """
        with self._turn, held_interrupts() as let_through:
            output = self.engine.resume(path, str(next(self._ids)))
            return output if output.finished else self._finish([output.request_id], use_tqdm, let_through)[0]

    def _finish(
        self, request_ids: Sequence[str], use_tqdm: bool, between_steps: Callable[[], None]
    ) -> list[RequestOutput]:
        """Run started requests to their ends."""
        outputs: dict[str, RequestOutput] = {}
        try:
            with tqdm(total=len(request_ids), desc="Requests", disable=not use_tqdm) as bar:
                while self.engine.has_unfinished_requests():
                    for output in self.engine.step():
                        if output.finished:
                            outputs[output.request_id] = output
                            bar.update()
                    between_steps()
        finally:
            for request_id in request_ids:
                self.engine.abort(request_id)
        return [outputs[request_id] for request_id in request_ids]

    def close(self) -> None:
        """Give all memory back, as happens by itself with the last reference; nothing works afterwards."""
        with self._turn:
            self._close()

    def __reduce__(self) -> Any:
        raise TypeError("an LLM cannot be pickled or copied: load the model in each process that uses it")

    def _params(self, params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        many = [params] * count if isinstance(params, SamplingParams) else list(params)
        if len(many) != count:
            raise RequestError(f"{count} prompts, but {len(many)} sampling_params", param="sampling_params")
        wrong = next((own for own in many if not isinstance(own, SamplingParams)), None)
        if wrong is not None or None in many:
            raise RequestError(f"sampling_params must be SamplingParams, not {wrong!r}", param="sampling_params")
        return many


def _listed(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt or many, as many."""
    if isinstance(prompts, str | bytes | Mapping):
        return [prompts]
    try:
        many: Any = list(prompts)
    except TypeError:
        return [prompts]  # type: ignore[list-item]  # refused with what a prompt is
    return [many] if many and all(isinstance(item, int) for item in many) else many
