"""The engines that need no environment of their own, over a tiny model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig

from benchmarks.peers.engines.driver import Engine, Load, Sample
from benchmarks.peers.engines.ours import Ours
from benchmarks.peers.engines.transformers_batch import ContinuousBatches
from benchmarks.peers.engines.transformers_generate import PaddedBatches
from tests.benchmarks.peers.engines.requests import request
from tests.model.tiny import tiny_llama

REQUESTS = [request(5, 4), request(9, 2), request(3, 1)]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path)
    return tmp_path


def load(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", attn_implementation="sdpa").eval()


ENGINES: dict[str, Callable[[Path], Engine]] = {
    "ours": lambda path: Ours(str(path), {"kv_memory": "16MiB"}),
    "padded": lambda path: PaddedBatches(load(path), batch_size=2),
    "continuous": lambda path: ContinuousBatches(load(path)),
}


def tokens(outputs: list[list[Sample]]) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in samples] for samples in outputs]


older_transformers = pytest.mark.skipif(
    "page_size" not in inspect.signature(ContinuousBatchingConfig).parameters,
    reason="this transformers calls the settings of its continuous batches otherwise",
)


@pytest.mark.parametrize("name", ["ours", "padded", pytest.param("continuous", marks=older_transformers)])
def test_engines_complete_requests_of_different_lengths(name: str, checkpoint: Path) -> None:
    engine = ENGINES[name](checkpoint)
    engine.prepare(Load(64, 8, uniform=False))
    try:
        outputs = engine.complete(REQUESTS)
        assert [[len(sample.token_ids) for sample in samples] for samples in outputs] == [[4], [2], [1]]
        assert all(sample.times == sorted(sample.times) for samples in outputs for sample in samples)
        one = PaddedBatches(load(checkpoint), batch_size=1)
        assert tokens(outputs) == tokens(one.complete(REQUESTS))
        samples = engine.complete([request(5, 4, n=3)])
        assert [len(sample.token_ids) for sample in samples[0]] == [4, 4, 4]
    finally:
        engine.close()


def test_end_tokens_end_nothing(checkpoint: Path) -> None:
    model = load(checkpoint)
    model.generation_config.eos_token_id = list(range(400))
    assert len(PaddedBatches(model, None).complete([request(5, 6)])[0][0].token_ids) == 6
