"""The whole engine on every device there is: a GPU is tried where torch sees one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.tiny import tiny_folder, tiny_llama
from vattention import LLM, SamplingParams

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PROMPTS = [list(range(5, 5 + length)) for length in (3, 40, 17)]
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("kv", ["virtual", "paged", "reserved"])
@pytest.mark.parametrize("device", DEVICES)
def test_greedy_tokens_are_the_models_own(device: str, kv: str, folder: Path) -> None:
    model = tiny_llama().to(device)
    expected = [
        model.generate(
            torch.tensor([prompt], device=device), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    options: dict[str, Any] = {
        "device": device,
        "kv": kv,
        "dtype": "float32",
        "kv_memory": "256MiB",
        "max_num_seqs": 4,
    }
    with LLM(str(folder), max_num_batched_tokens=16, **options) as llm:
        assert str(llm.engine.manager.layer(0).keys.device.type) == device
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        # Once more, from what the prefix cache knows by now.
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv", ["virtual", "paged", "reserved"])
def test_decode_steps_are_graphs(kv: str, dtype: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    options: dict[str, Any] = {"device": "cuda", "kv": kv, "dtype": dtype, "kv_memory": "256MiB", "block_size": 256}
    tokens = {}
    for enforce_eager in (False, True):
        with LLM(str(folder), max_num_seqs=4, enforce_eager=enforce_eager, **options) as llm:
            graphs = llm.engine._parts.runner._graphs
            assert (graphs is None) == enforce_eager, caplog.text
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
            tokens[enforce_eager] = [output.outputs[0].token_ids for output in outputs]
    if dtype == "float32":
        assert tokens[False] == tokens[True]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
