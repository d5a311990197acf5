"""Conversations on disk: a running request that goes on later, a finished one whose next turn comes later.

Keys and values are stored per layer and token, so a file goes into any engine with the same model, whichever
manager and layout it has. What of them the cache does not hold is not computed for the file: its tokens are stored,
and are computed when the conversation goes on.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from vattention.engine import suspend_file
from vattention.engine.intake import Intake, salt_of
from vattention.engine.parts import Parts
from vattention.engine.request import Request
from vattention.engine.sequence import Sequence
from vattention.errors import ContextLengthError, RequestError
from vattention.kv.portable import LayerImage
from vattention.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from vattention.sampling_params import SamplingParams


class Suspender:
    """Writes conversations to files, and takes them in again."""

    def __init__(self, parts: Parts, intake: Intake) -> None:
        self._parts = parts
        self._intake = intake

    def write_request(self, request: Request, path: str | Path) -> None:
        """Write a request that runs or waits, as it is between two steps. It goes on unless its owner ends it.

        Raises:
            OSError, DriverError: the file cannot be written.
        """
        images = {
            sequence.index: self._image(sequence.slot, sequence.num_computed)
            for sequence in request.sequences
            if sequence.slot is not None
        }
        self._write(path, "request", _request_record(request), images)

    def write_output(self, output: RequestOutput, cache_salt: str, path: str | Path) -> None:
        """Write a finished conversation, with what the prefix cache still has of its keys and values.

        Raises:
            OSError, DriverError: the file cannot be written.
            OutOfMemoryError: no slot is free to look into the cache.
        """
        manager = self._parts.manager
        images = {}
        for sample in output.outputs:
            token_ids = [*output.prompt_token_ids, *sample.token_ids]
            placement = manager.take(token_ids, salt=salt_of(cache_salt))
            try:
                images[sample.index] = self._image(placement.slot, placement.num_cached_tokens)
            finally:
                manager.release(placement.slot, token_ids[: placement.num_cached_tokens])
        self._write(path, "output", {**_output_record(output), "cache_salt": cache_salt}, images)

    def read(self, path: str | Path, request_id: str, priority: int) -> Request | RequestOutput:
        """Take a file in: a request to go on with, or the output of a finished one.

        What a finished one's next turn can use is in the prefix cache on return, if there is one.

        Raises:
            OSError: the file cannot be read.
            RequestError: it is damaged, of another model, or does not fit this engine's context.
            OutOfMemoryError: no slot or no memory is free for what goes into the cache.
        """
        record, tensors = suspend_file.read(path)
        if record["fingerprint"] != self._parts.fingerprint:
            raise RequestError(
                f"{str(path)!r} cannot be resumed: it was written by the model {record['model']!r} with other "
                f"weights than {self._parts.name!r} has here",
                param="path",
            )
        images = {int(index): self._loaded(path, int(index), n, tensors) for index, n in record["images"].items()}
        if record["kind"] == "request":
            return self._request(record["request"], images, request_id, priority)
        return self._output(record["output"], images, request_id)

    def _image(self, slot: int, num_tokens: int) -> LayerImage:
        return LayerImage.of(self._parts.manager, self._parts.cache_specs, slot, num_tokens)

    def _write(
        self, path: str | Path, kind: str, what: Mapping[str, Any], images: Mapping[int, LayerImage]
    ) -> None:
        kept = {index: image for index, image in images.items() if image.num_tokens}
        record = {
            "kind": kind,
            "model": self._parts.name,
            "fingerprint": self._parts.fingerprint,
            "images": {index: image.num_tokens for index, image in kept.items()},
            kind: what,
        }
        tensors = {
            _tensor_name(index, layer, part): tensor
            for index, image in kept.items()
            for layer, pair in enumerate(image.layers)
            for part, tensor in zip(_PARTS, pair, strict=True)
        }
        suspend_file.write(path, record, tensors)

    def _loaded(
        self, path: str | Path, index: int, num_tokens: int, tensors: Mapping[str, torch.Tensor]
    ) -> LayerImage:
        layers = range(len(self._parts.cache_specs))
        keys, values = ([tensors.get(_tensor_name(index, layer, part)) for layer in layers] for part in _PARTS)
        pairs = [(k, v) for k, v in zip(keys, values, strict=True) if k is not None and v is not None]
        image = LayerImage(num_tokens, pairs)
        if not image.fits(self._parts.manager, self._parts.cache_specs):
            raise RequestError(
                f"{str(path)!r} cannot be resumed: its keys and values have other types or shapes than this "
                "engine's; choose the dtype and the max_model_len that it was written with",
                param="path",
            )
        return image

    def _request(
        self, record: Mapping[str, Any], images: Mapping[int, LayerImage], request_id: str, priority: int
    ) -> Request:
        prompt, params = record["prompt_token_ids"], SamplingParams(**record["params"])
        room = self._parts.max_model_len - len(prompt)
        longest = max(len(sequence["output_token_ids"]) for sequence in record["sequences"])
        if room <= longest:
            raise ContextLengthError(
                f"the conversation has {len(prompt) + longest:,} tokens, and this engine's context of "
                f"{self._parts.max_model_len:,} tokens must hold it and at least one more",
                param="path",
            )
        request = Request(
            id=request_id,
            text=record["text"],
            prompt_token_ids=prompt,
            params=params,
            priority=priority,
            arrival=self._intake.arrival(),
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            end_token_ids=self._parts.end_token_ids,
            metrics=RequestMetrics(arrival_time=time.monotonic()),
            bad_words=self._intake.bad_words(params),
            grammar=self._intake.grammar(params),
            cache_salt=record["cache_salt"],
            prompt_logprobs=_logprobs_from(record["prompt_logprobs"]),
            num_cached_tokens=record["num_cached_tokens"],
        )
        request.sequences = [
            self._sequence(request, saved, images.get(saved["index"])) for saved in record["sequences"]
        ]
        return request

    def _sequence(self, request: Request, saved: Mapping[str, Any], image: LayerImage | None) -> Sequence:
        text = self._intake.text(request.prompt_token_ids, request.params)
        if text is not None and saved["finish_reason"] is None:
            for count, token in enumerate(saved["output_token_ids"], start=1):
                text.add(token, may_stop=count >= request.params.min_tokens)
        elif text is not None:
            text.text = saved["text"]
        return Sequence(
            request=request,
            index=saved["index"],
            seed=saved["seed"],
            text=text,
            output_token_ids=saved["output_token_ids"],
            image=image,
            finish_reason=saved["finish_reason"],
            stop_reason=saved["stop_reason"],
            logprobs=_logprobs_from(saved["logprobs"]) or [],
            cumulative_logprob=saved["cumulative_logprob"],
        )

    def _output(
        self, record: Mapping[str, Any], images: Mapping[int, LayerImage], request_id: str
    ) -> RequestOutput:
        samples = [
            CompletionOutput(**{**sample, "logprobs": _logprobs_from(sample["logprobs"])})
            for sample in record["outputs"]
        ]
        prompt = record["prompt_token_ids"]
        for sample in samples:
            if sample.index in images:
                self._park(images[sample.index], [*prompt, *sample.token_ids], salt_of(record["cache_salt"]))
        return RequestOutput(
            request_id=request_id,
            prompt=record["prompt"],
            prompt_token_ids=prompt,
            outputs=samples,
            finished=True,
            prompt_logprobs=_logprobs_from(record["prompt_logprobs"]),
            num_cached_tokens=record["num_cached_tokens"],
        )

    def _park(self, image: LayerImage, token_ids: list[int], salt: str) -> None:
        """Make an image's tokens known to the prefix cache."""
        manager, count = self._parts.manager, image.num_tokens
        slot = manager.take((), salt=salt).slot
        known: list[int] = []
        try:
            manager.ensure(slot, count, count)
            image.load(manager, slot)
            known = token_ids[:count]
        finally:
            manager.release(slot, known)


_PARTS = ("keys", "values")


def _tensor_name(index: int, layer: int, part: str) -> str:
    return f"samples.{index}.layers.{layer}.{part}"


def _request_record(request: Request) -> dict[str, Any]:
    return {
        "text": request.text,
        "prompt_token_ids": request.prompt_token_ids,
        "params": dataclasses.asdict(request.params),
        "cache_salt": request.cache_salt,
        "prompt_logprobs": _logprobs_record(request.prompt_logprobs),
        "num_cached_tokens": request.num_cached_tokens,
        "sequences": [
            {
                "index": sequence.index,
                "seed": sequence.seed,
                "output_token_ids": sequence.output_token_ids,
                "text": sequence.text.text if sequence.text is not None else "",
                "finish_reason": sequence.finish_reason,
                "stop_reason": sequence.stop_reason,
                "logprobs": _logprobs_record(sequence.logprobs),
                "cumulative_logprob": sequence.cumulative_logprob,
            }
            for sequence in request.sequences
        ],
    }


def _output_record(output: RequestOutput) -> dict[str, Any]:
    return {
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "prompt_logprobs": _logprobs_record(output.prompt_logprobs),
        "num_cached_tokens": output.num_cached_tokens,
        "outputs": [
            {**dataclasses.asdict(sample), "logprobs": _logprobs_record(sample.logprobs)}
            for sample in output.outputs
        ],
    }


def _logprobs_record(logprobs: Iterable[TokenLogprobs | None] | None) -> list[Any] | None:
    """JSON has no integers for keys."""
    if logprobs is None:
        return None
    return [
        entry and [[token, one.logprob, one.rank, one.decoded_token] for token, one in entry.items()]
        for entry in logprobs
    ]


def _logprobs_from(record: list[Any] | None) -> Any:
    if record is None:
        return None
    return [
        entry and {token: Logprob(logprob, rank, text) for token, logprob, rank, text in entry} for entry in record
    ]
