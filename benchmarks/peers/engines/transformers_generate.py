"""transformers' `generate` in padded batches.

Prompts are padded on the left to the batch's longest, and a batch runs until its longest output is done; only the
tokens that requests asked for count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria

from benchmarks.peers.engines.driver import Load, Sample, drive, num_wanted
from vattention.bench.workload import BenchRequest

PAD = 0


class StepClock(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing; notes when each step of `generate` ended, in `time.perf_counter()` seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class PaddedBatches:
    """One batch after another; a batch has the requests of one n and one temperature."""

    packages = ("transformers", "torch")

    def __init__(self, model: Any, batch_size: int | None) -> None:
        self.settings = {} if batch_size is None else {"batch_size": batch_size}
        self._model = model
        self._batch_size = batch_size

    def prepare(self, load: Load) -> None: ...

    def complete(self, requests: Sequence[BenchRequest]) -> list[list[Sample]]:
        if len({(request.params.n, request.params.temperature) for request in requests}) != 1:
            raise ValueError("one padded batch has one n and one temperature; these requests differ")
        size = self._batch_size or len(requests)
        outputs = []
        for begin in range(0, len(requests), size):
            outputs += self._generate(requests[begin : begin + size])
        return outputs

    def close(self) -> None: ...

    def _generate(self, batch: Sequence[BenchRequest]) -> list[list[Sample]]:
        longest = max(len(request.prompt_token_ids) for request in batch)
        max_new_tokens = max(map(num_wanted, batch))
        token_ids = torch.full((len(batch), longest), PAD)
        mask = torch.zeros_like(token_ids)
        for row, request in enumerate(batch):
            count = len(request.prompt_token_ids)
            token_ids[row, longest - count :] = torch.tensor(request.prompt_token_ids)
            mask[row, longest - count :] = 1
        params = batch[0].params
        sampling = {} if params.greedy else {"temperature": params.temperature, "top_k": 0, "top_p": 1.0}
        # What a passed configuration leaves open is taken from the model's own, which names end tokens.
        self._model.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=not params.greedy,
            num_return_sequences=params.n,
            pad_token_id=PAD,
            eos_token_id=None,
            **sampling,
        )
        clock = StepClock()
        with torch.inference_mode():
            out = self._model.generate(input_ids=token_ids, attention_mask=mask, stopping_criteria=[clock])
        rows = out[:, longest:].tolist()
        return [
            [
                Sample(rows[index * params.n + n][: num_wanted(request)], clock.times[: num_wanted(request)])
                for n in range(params.n)
            ]
            for index, request in enumerate(batch)
        ]


def build(arguments: argparse.Namespace) -> PaddedBatches:
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").eval()
    return PaddedBatches(model, arguments.batch_size)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="Measure transformers' generate in padded batches.")
    options.add_argument("--batch-size", type=int, help="requests per batch; all of them by default")
    drive(build, options)
