from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from tests.attention.dense import DenseManager
from tests.model.architectures import ARCHITECTURES, MAX_LEN, VOCAB_SIZE
from vattention.core import Chunk
from vattention.errors import UnsupportedModelError
from vattention.model.probe import probe
from vattention.model.rope import fix_rope
from vattention.model.runner import ModelRunner

ORIGINAL_LEN = 16

SETTINGS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": MAX_LEN,
    "original_max_position_embeddings": ORIGINAL_LEN,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": ORIGINAL_LEN,
}

SHORT, LONG = list(range(3, 12)), list(range(3, 43))


def phi3(**rope: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.Phi3Config(**SETTINGS, rope_parameters=rope or LONGROPE)
    model: PreTrainedModel = transformers.Phi3ForCausalLM(config).eval().requires_grad_(False)
    return model


def last_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    attention = probe(model)
    kv = DenseManager(attention.cache_specs, num_slots=len(prompts), max_len=MAX_LEN)
    runner = ModelRunner(model, attention, kv)
    try:
        return runner.forward([Chunk(kv.take(prompt).slot, 0, prompt, 1) for prompt in prompts])
    finally:
        runner.close()


def own_logits(model: PreTrainedModel, prompt: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([prompt]), use_cache=False).logits
    return logits[0, -1:]


def test_without_it_a_long_neighbour_changes_a_short_prompt() -> None:
    model = phi3()
    assert (last_logits(model, [SHORT, LONG])[0] - last_logits(model, [SHORT])[0]).abs().max() > 0.1


def test_longrope_does_not_depend_on_the_batch() -> None:
    model = phi3()
    fix_rope(model, MAX_LEN)
    together = last_logits(model, [SHORT, LONG])
    torch.testing.assert_close(together[:1], last_logits(model, [SHORT]))
    torch.testing.assert_close(together[1:], last_logits(model, [LONG]))


def test_a_long_engine_takes_the_long_factors() -> None:
    model = phi3()
    fix_rope(model, ORIGINAL_LEN + 1)
    torch.testing.assert_close(last_logits(model, [LONG]), own_logits(phi3(), LONG))
    assert (last_logits(model, [SHORT]) - own_logits(phi3(), SHORT)).abs().max() > 0.1


def test_a_short_engine_takes_the_short_factors() -> None:
    model = phi3()
    fix_rope(model, ORIGINAL_LEN)
    torch.testing.assert_close(last_logits(model, [SHORT]), own_logits(phi3(), SHORT))


def test_dynamic_scaling_is_refused_beyond_its_original_length() -> None:
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    settings = {key: value for key, value in SETTINGS.items() if not key.startswith("original")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, rope_parameters=rope)).eval()
    with pytest.raises(UnsupportedModelError, match=rf"dynamic RoPE.*max_model_len to {MAX_LEN} or less"):
        fix_rope(model, MAX_LEN + 1)
    fix_rope(model, MAX_LEN)
    torch.testing.assert_close(last_logits(model, [SHORT, LONG])[:1], own_logits(model, SHORT))


def test_longrope_of_a_model_that_switches_by_itself_is_refused() -> None:
    torch.manual_seed(0)
    rope = LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3}
    config = transformers.PhimoeConfig(**SETTINGS, num_local_experts=2, rope_parameters=rope)
    model = transformers.PhimoeForCausalLM(config).eval()
    with pytest.raises(UnsupportedModelError, match=f"longrope RoPE.*max_model_len to {ORIGINAL_LEN} or less"):
        fix_rope(model, MAX_LEN)
    fix_rope(model, ORIGINAL_LEN)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_other_kinds_stay(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    kinds = [module.rope_type for module in model.modules() if hasattr(module, "rope_type")]
    fix_rope(model, 1 << 20)
    assert [module.rope_type for module in model.modules() if hasattr(module, "rope_type")] == kinds
