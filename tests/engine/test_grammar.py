"""Texts that have to follow a grammar, on a tiny random model, which would never do so by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.model.tiny import tiny_folder
from vattention.config import EngineConfig
from vattention.engine.async_engine import AsyncEngine
from vattention.errors import RequestError
from vattention.outputs import RequestOutput
from vattention.sampling_params import SamplingParams

pytest.importorskip("llguidance")
pytest.importorskip("pytest_asyncio")

COMPACT = {"x-guidance": {"whitespace_flexible": False}}
ARRAY = "start: %json " + json.dumps(
    {"type": "array", "items": {"enum": [1, 20, 300]}, "minItems": 50, "maxItems": 60, **COMPACT}
)
PROMPT: Any = {"prompt_token_ids": [5, 6, 7]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[AsyncEngine]:
    made = AsyncEngine.from_config(EngineConfig(model=str(folder), max_num_seqs=4, kv_memory="16MiB"))
    yield made
    made.shutdown()


def params(**options: Any) -> SamplingParams:
    return SamplingParams(**{"grammar": ARRAY, "max_tokens": 700, "seed": 7, **options})


async def last(engine: AsyncEngine, wanted: SamplingParams) -> RequestOutput:
    return [output async for output in engine.submit(PROMPT, wanted)][-1]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"n": 3}, {"n": 2, "best_of": 3}, {"logprobs": 2}])
async def test_every_sample_follows_it_to_the_end(engine: AsyncEngine, options: dict[str, Any]) -> None:
    samples = (await last(engine, params(**options))).outputs
    assert len(samples) == options.get("n", 1)
    for sample in samples:
        assert sample.finish_reason == "stop"
        assert 50 <= len(json.loads(sample.text)) <= 60
    assert len({sample.text for sample in samples}) == len(samples)


async def test_others_in_the_batch_are_free(engine: AsyncEngine) -> None:
    alone = await last(engine, params(grammar=None, max_tokens=40))
    stream = engine.submit(PROMPT, params())
    beside = await last(engine, params(grammar=None, max_tokens=40))
    assert beside.outputs[0].token_ids == alone.outputs[0].token_ids
    assert json.loads([output async for output in stream][-1].outputs[0].text)


async def test_suspended_in_the_middle_it_goes_on_as_it_would_have(engine: AsyncEngine, tmp_path: Path) -> None:
    whole = (await last(engine, params())).outputs[0].token_ids
    stream = engine.submit(PROMPT, params(), request_id="a")
    await anext(stream)
    await engine.suspend("a", tmp_path / "a")
    outputs = [output async for output in stream]
    assert not outputs or not outputs[-1].finished
    resumed = [output async for output in await engine.resume(tmp_path / "a")]
    assert resumed[-1].outputs[0].token_ids == whole


async def test_a_grammar_that_is_none_is_refused_at_once(engine: AsyncEngine) -> None:
    with pytest.raises(RequestError, match="cannot be used"):
        engine.submit(PROMPT, params(grammar="start: nothing"))


async def test_without_a_tokenizer_there_are_no_grammars(folder: Path) -> None:
    config = EngineConfig(model=str(folder), max_num_seqs=1, kv_memory="16MiB", skip_tokenizer_init=True)
    engine = AsyncEngine.from_config(config)
    try:
        with pytest.raises(RequestError, match="needs a tokenizer"):
            engine.submit(PROMPT, params())
    finally:
        engine.shutdown()
