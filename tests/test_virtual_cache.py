"""`VirtualCache` in transformers' `generate`: the tokens are `DynamicCache`'s, and the memory comes and goes."""

from __future__ import annotations

import copy
import doctest
import gc
import io
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
)

from vattention.errors import ConfigError, ContextLengthError, OutOfMemoryError, UnsupportedModelError
from vattention.hf.layers import VirtualLayer, VirtualSlidingLayer
from vattention.virtual_cache import VirtualCache

# Large weights make random models say different things at each step.
SIZES: dict[str, Any] = {
    "vocab_size": 89,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.5,
}
ATTENTION: dict[str, Any] = {
    **SIZES,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


@cache
def model(name: str) -> Any:
    torch.manual_seed(5)
    built: Any
    if name in ("llama", "llama-eager"):
        built = LlamaForCausalLM(
            LlamaConfig(**ATTENTION, attn_implementation="eager" if name == "llama-eager" else "sdpa")
        )
    elif name == "mistral":
        built = MistralForCausalLM(MistralConfig(**ATTENTION, sliding_window=12))
    elif name == "gemma3":
        layer_types = ["sliding_attention", "full_attention"]
        built = Gemma3ForCausalLM(
            Gemma3TextConfig(**ATTENTION, head_dim=16, sliding_window=10, layer_types=layer_types)
        )
    else:
        built = BloomForCausalLM(BloomConfig(**{**SIZES, "initializer_range": 2.0}))
    return built.eval()


def prompts(batch: int, length: int = 21) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left."""
    ids = torch.randint(2, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 4 * row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def generate(name: str, past: Any, batch: int = 1, *, length: int = 21, **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    options = {"max_new_tokens": 30, "do_sample": False, **options}
    tokens = model(name).generate(**prompts(batch, length), past_key_values=past, **options)
    assert isinstance(tokens, torch.Tensor)
    return tokens


def virtual(name: str, **options: Any) -> VirtualCache:
    config = model(name).config
    return VirtualCache(config, **({"max_length": 512} if name == "bloom" else {}), **options)


WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy": (1, {}),
    "left padding": (3, {}),
    "sampling": (3, {"do_sample": True, "num_return_sequences": 2}),
    "beams": (1, {"num_beams": 4}),
    "beams, left padding": (3, {"num_beams": 3, "num_return_sequences": 2}),
    "sampled beams": (2, {"num_beams": 3, "do_sample": True}),
    "prompt lookup": (1, {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}),
    "chunked prefill": (1, {"prefill_chunk_size": 8}),
}
MODELS = ["llama", "llama-eager", "mistral", "gemma3", "bloom"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_the_dynamic_cache(name: str, way: str) -> None:
    batch, options = WAYS[way]
    expected = generate(name, DynamicCache(config=model(name).config), batch, **options)
    assert torch.equal(generate(name, virtual(name), batch, **options), expected)
    assert len(set(expected[:, -30:].flatten().tolist())) > 5, "the model says too little to compare"


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_assisted_generation(name: str) -> None:
    torch.manual_seed(11)
    assistant = LlamaForCausalLM(LlamaConfig(**ATTENTION)).eval()
    # An assistant that is the model itself has its drafts accepted, another one has them rolled back.
    for helper in (assistant, model("llama")):
        expected = generate(name, DynamicCache(config=model(name).config))
        assert torch.equal(generate(name, virtual(name), assistant_model=helper), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_conversation_goes_on_with_the_same_cache(name: str) -> None:
    def talk(past: Any) -> list[torch.Tensor]:
        said = [generate(name, past, max_new_tokens=9)]
        for question in ([5, 6, 7], [8]):
            ids = torch.cat([said[-1], torch.tensor([question])], dim=1)
            said.append(
                model(name).generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=past,
                    max_new_tokens=9,
                    do_sample=False,
                )
            )
        return said

    for got, expected in zip(talk(virtual(name)), talk(DynamicCache(config=model(name).config)), strict=True):
        assert torch.equal(got, expected)


def test_one_prefix_serves_many_prompts_through_deep_copies() -> None:
    llama = model("llama")
    prefix = prompts(1)["input_ids"]
    past = virtual("llama")
    with torch.no_grad():
        llama(prefix, past_key_values=past)
    for end in ([5, 6], [7, 8, 9]):
        ids = torch.cat([prefix, torch.tensor([end])], dim=1)
        options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 9, "do_sample": False}
        got = llama.generate(ids, past_key_values=copy.deepcopy(past), **options)
        assert torch.equal(got, llama.generate(ids, **options))
    assert past.get_seq_length() == prefix.shape[1]


def test_a_saved_cache_is_as_small_as_its_tokens_and_goes_on() -> None:
    past = virtual("gemma3")
    generate("gemma3", past, max_new_tokens=3)
    file = io.BytesIO()
    torch.save(past, file)
    assert file.tell() < past.reserved_nbytes / 4
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for got, expected in zip(loaded.layers, past.layers, strict=True):
        got.prefetch()
        assert torch.equal(got.keys, expected.keys)
    assert loaded.mapped_nbytes > 0


def test_two_caches_do_not_disturb_each_other() -> None:
    first, second = virtual("llama"), virtual("llama")
    generate("llama", first, max_new_tokens=5)
    before = [layer.keys.clone() for layer in first.layers]
    generate("llama", second, 3, max_new_tokens=5)
    for layer, keys in zip(first.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)


def test_a_reset_cache_serves_another_batch() -> None:
    past = virtual("llama")
    for batch in (3, 1, 2):
        expected = generate("llama", DynamicCache(config=model("llama").config), batch)
        assert torch.equal(generate("llama", past, batch), expected)
        past.reset()
        assert past.mapped_nbytes == past.reserved_nbytes == past.get_seq_length() == 0


def test_offloaded_layers_come_back_by_themselves_and_on_demand() -> None:
    past = virtual("gemma3")
    said = generate("gemma3", past, max_new_tokens=9)
    for index in range(len(past)):
        past.offload(index, only_non_sliding=False)
    assert past.mapped_nbytes == 0
    past.prefetch(1)
    assert [layer.is_offloaded for layer in past.layers] == [True, False]
    past.prefetch(1)  # layer 0 is sliding, and left where it is
    assert [layer.is_offloaded for layer in past.layers] == [True, False]
    ids = torch.cat([said, torch.tensor([[5]])], dim=1)
    expected = model("gemma3").generate(ids, max_new_tokens=9, do_sample=False)
    assert torch.equal(
        model("gemma3").generate(ids, max_new_tokens=9, do_sample=False, past_key_values=past), expected
    )


def test_a_compiled_model_may_use_it() -> None:
    llama = model("llama")
    compiled: Any = torch.compile(llama, backend="eager")
    past, reference = virtual("llama"), DynamicCache(config=llama.config)
    ids = prompts(1)["input_ids"]
    with torch.no_grad():
        for part in (ids[:, :15], ids[:, 15:16], ids[:, 16:17]):
            got = compiled(part, past_key_values=past).logits
            torch.testing.assert_close(got, llama(part, past_key_values=reference).logits)


def test_it_looks_like_a_dynamic_cache() -> None:
    config = model("gemma3").config
    past, reference = VirtualCache(config), DynamicCache(config=config)
    for _ in range(2):
        assert len(past) == len(reference)
        for name in ("is_sliding", "is_compileable", "is_croppable", "is_initialized"):
            assert getattr(past, name) == getattr(reference, name), name
        assert past.get_max_length() == reference.get_max_length()
        for index in range(len(past)):
            assert past.get_mask_sizes(3, index) == reference.get_mask_sizes(3, index)
            assert past.get_max_length(index) == reference.get_max_length(index)
        for each in (past, reference):
            model("gemma3")(prompts(1)["input_ids"], past_key_values=each)
    assert [type(layer) for layer in past.layers] == [VirtualSlidingLayer, VirtualLayer]
    assert past.is_compileable is False


def test_the_longest_sequence_comes_from_the_config() -> None:
    assert virtual("llama").max_length == 2048
    with pytest.raises(ConfigError, match="max_length"):
        VirtualCache(model("bloom").config)
    with pytest.raises(ConfigError, match="max_length"):
        virtual("llama", max_length=0)


def test_beyond_the_longest_sequence_says_which_knob_to_turn() -> None:
    past = virtual("llama", max_length=40)
    with pytest.raises(ContextLengthError, match=r"41 tokens.* 40; raise .*max_length"):
        generate("llama", past)
    assert past.get_seq_length() == 40


def test_after_a_shortage_a_reset_cache_works() -> None:
    past = virtual("llama", limit_nbytes=9 * 2**14)
    with pytest.raises(OutOfMemoryError):
        generate("llama", past, length=600)
    past.reset()
    assert torch.equal(generate("llama", past), generate("llama", None))


def test_attention_that_keeps_other_state_is_refused() -> None:
    class Hybrid(PreTrainedConfig):  # type: ignore[misc]
        layer_types = ("full_attention", "hybrid")
        num_hidden_layers = 2
        max_position_embeddings = 64

    with pytest.raises(UnsupportedModelError, match="LinearAttentionAndFullAttentionLayer"):
        VirtualCache(Hybrid())


def shared_nbytes() -> int:
    """Shared memory of this process, which is where the host's pages are, as the system counts it."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssShmem"))


def drop_cache(past: VirtualCache) -> None:
    """Nothing to do: the caller's last reference is what goes."""


@pytest.mark.parametrize("give_back", [drop_cache, VirtualCache.reset])
def test_the_system_has_its_memory_back(give_back: Callable[[VirtualCache], None]) -> None:
    gc.collect()
    before = shared_nbytes()
    past = virtual("llama")
    generate("llama", past, 3)
    assert shared_nbytes() - before >= past.mapped_nbytes > 0
    give_back(past)
    if give_back is drop_cache:
        del past
    gc.collect()
    assert shared_nbytes() == before


def test_tensors_outlive_their_cache_with_their_memory() -> None:
    gc.collect()
    before = shared_nbytes()
    past = virtual("llama")
    generate("llama", past)
    keys = past.layers[0].keys
    expected = keys.clone()
    del past
    gc.collect()
    assert torch.equal(keys, expected)
    assert shared_nbytes() > before
    del keys
    gc.collect()
    assert shared_nbytes() == before


def test_the_example_in_the_docstring() -> None:
    names = {"VirtualCache": VirtualCache, "model": model("llama"), "inputs": prompts(2)}
    (example,) = doctest.DocTestFinder(recurse=False).find(VirtualCache, "VirtualCache", globs=names)
    assert doctest.DocTestRunner().run(example).failed == 0
    assert len(example.examples) == 3
