"""All decoder layers in one call: what they compute one by one, and models that do more between them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel, Qwen3Config

from tests.model.architectures import ARCHITECTURES
from tests.model.greedy import generate, greedy
from vattention.config import EngineConfig
from vattention.core import Chunk
from vattention.kv.build import create_manager
from vattention.kv.manager import KVManager
from vattention.model import optimize as optimizing
from vattention.model.decoder_stack import DecoderStack
from vattention.model.fused_layer import fuse_layers
from vattention.model.native_linear import NativeLinear
from vattention.model.optimize import optimize
from vattention.model.probe import probe
from vattention.model.rotary import RotaryTables
from vattention.model.runner import ModelRunner
from vattention.native import Rotaries, Workspace, kernels
from vattention.native.huge import huge_empty

pytestmark = pytest.mark.skipif(kernels() is None, reason="no compiled kernels here")

PROMPTS = [[5, 9, 33, 2, 71, 8, 9], [7, 7, 40], [100, 3, 64, 21, 90, 11, 12, 13, 14, 15, 16, 17]]
MAX_LEN = 1024
BEHIND = 1 << 20
LIKE_LLAMA: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_LEN,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**LIKE_LLAMA),
    "llama-bias": lambda: LlamaConfig(**LIKE_LLAMA, mlp_bias=True, attention_bias=True),
    "qwen3": lambda: Qwen3Config(**LIKE_LLAMA),
    "gemma3": lambda: Gemma3TextConfig(**LIKE_LLAMA, sliding_window=24, sliding_window_pattern=2),
}


@pytest.fixture(autouse=True)
def compiled_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizing, "fastest_method", lambda *_: NativeLinear)


@pytest.fixture(autouse=True)
def workspaces_end_where_they_say(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is written behind the memory that layers ask for."""
    made: list[torch.Tensor] = []

    def check() -> None:
        assert all(bool((memory[-BEHIND:] == 0xAB).all()) for memory in made)
        made.clear()

    def address(_: Workspace, nbytes: int) -> int:
        check()
        made.append(huge_empty(nbytes + BEHIND, torch.uint8))
        made[0][nbytes:] = 0xAB
        return made[0].data_ptr()

    monkeypatch.setattr(Workspace, "address", address)
    yield
    check()


def built(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.to(dtype)


class Rig:
    def __init__(self, model: PreTrainedModel, kv: str = "virtual", fuse: bool = True) -> None:
        optimize(model)
        attention = probe(model)
        self.num_layers = len(attention.layers)
        self.num_fused = fuse_layers(model, attention) if fuse else 0
        config = EngineConfig(model="none", kv=kv, max_num_seqs=4, kv_memory="64MiB", block_size=4)  # type: ignore[arg-type]
        self.cache: KVManager = create_manager(
            config, attention.cache_specs, dtype=model.dtype, device="cpu", max_len=MAX_LEN
        )
        self.runner = ModelRunner(model, attention, self.cache)

    @property
    def stack(self) -> DecoderStack | None:
        return self.runner._stack

    def logits(self, *chunks: Chunk) -> torch.Tensor:
        for chunk in chunks:
            self.cache.ensure(chunk.slot, chunk.start, chunk.end)
        return self.runner.forward(chunks)

    def close(self) -> None:
        self.runner.close()
        self.cache.close()


@pytest.fixture
def rigs() -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(*arguments: Any) -> Rig:
        made.append(Rig(*arguments))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.mark.parametrize("kv", ["virtual", "paged", "reserved"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_tokens_equal_those_of_generate(
    name: str, kv: str, rigs: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(ARCHITECTURES[name](), PROMPTS, 12)
    rig = rigs(ARCHITECTURES[name](), kv)
    calls: list[int] = []

    def counted(stack: DecoderStack, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        return forward(stack, *arguments)

    forward = DecoderStack.__call__
    monkeypatch.setattr(DecoderStack, "__call__", counted)
    assert greedy(rig.runner, rig.cache, PROMPTS, 12) == expected
    assert len(calls) >= 11


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kv", ["virtual", "paged"])
def test_batches_of_any_shape_give_what_layers_one_by_one_give(
    name: str, kv: str, rigs: Callable[..., Rig]
) -> None:
    """Prompts of one and of several blocks of rows, chunks on top of a history, and steps beside them."""
    rig = rigs(built(CONFIGS[name](), torch.bfloat16), kv)
    assert rig.num_fused == rig.num_layers
    stack = rig.stack
    assert stack is not None
    tokens = torch.randint(0, 128, (900,), generator=torch.Generator().manual_seed(1)).tolist()
    slots = [rig.cache.take([token]).slot for token in tokens[:3]]
    batches = (
        [Chunk(slots[0], 0, tokens[:300], 1), Chunk(slots[1], 0, tokens[:7], 2)],
        [Chunk(slots[1], 7, tokens[7:8], 1), Chunk(slots[0], 300, tokens[300:433], 1), Chunk(slots[2], 0, [9], 1)],
        [Chunk(slots[2], 1, tokens[1:40], 1), Chunk(slots[0], 433, tokens[433:434], 1)],
        [Chunk(slots[0], 434, tokens[434:435], 1), Chunk(slots[2], 40, tokens[40:41], 1)],
        [Chunk(slots[2], 41, tokens[41:42], 1), Chunk(slots[0], 435, tokens[435:835], 1)],
    )
    together = [rig.logits(*batch) for batch in batches]
    rig.runner._stack = None
    for batch, result in zip(batches, together, strict=True):
        # Layers one by one round where these do, so that not a bit may differ.
        assert torch.equal(rig.logits(*batch), result)


@pytest.mark.parametrize("name", ["llama-bias", "gemma3"])
@pytest.mark.parametrize("kv", ["virtual", "paged"])
def test_the_last_layer_computes_only_rows_that_are_wanted(
    name: str, kv: str, rigs: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps, chunks without and with a few logits, and all; what is left out changes nothing else."""
    rig = rigs(built(CONFIGS[name](), torch.bfloat16), kv)
    tokens = torch.randint(0, 128, (500,), generator=torch.Generator().manual_seed(1)).tolist()
    slots = [rig.cache.take([token]).slot for token in tokens[:4]]
    num_logits = [
        {slots[0]: (0, 300, 0), slots[1]: (0, 9, 3)},
        {slots[0]: (300, 433, 2), slots[1]: (9, 10, 1), slots[2]: (0, 1, 1), slots[3]: (0, 50, 0)},
        {slots[2]: (1, 2, 1), slots[0]: (433, 434, 0), slots[3]: (50, 51, 1)},
        {slots[0]: (434, 470, 36), slots[3]: (51, 99, 1)},
        {slots[3]: (99, 140, 0)},
    ]
    attended: list[int] = []
    forward = DecoderStack.__call__

    def counted(stack: DecoderStack, *arguments: Any) -> torch.Tensor:
        hidden = forward(stack, *arguments)
        attended.append(len(hidden))
        return hidden

    monkeypatch.setattr(DecoderStack, "__call__", counted)
    for batch in num_logits:
        own = [Chunk(slot, a, tokens[a:b], count) for slot, (a, b, count) in batch.items()]
        result = rig.logits(*own)
        assert attended[-1] == len(result) == sum(chunk.num_logits for chunk in own)
        everything = rig.logits(
            *(Chunk(chunk.slot, chunk.start, chunk.token_ids, chunk.end - chunk.start) for chunk in own)
        )
        ends = torch.tensor([chunk.end - chunk.start for chunk in own]).cumsum(0).tolist()
        rows = [row for chunk, end in zip(own, ends, strict=True) for row in range(end - chunk.num_logits, end)]
        torch.testing.assert_close(result, everything[rows], rtol=2e-2, atol=6e-2)


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_blocks_of_rows_have_room_whatever_their_number(num_threads: int, rigs: Callable[..., Rig]) -> None:
    """Fewer rows, at the end of a batch or where few are wanted, may mean larger blocks."""
    wide = LlamaConfig(**{**LIKE_LLAMA, "num_hidden_layers": 2, "intermediate_size": 2112})
    rig = rigs(built(wide, torch.bfloat16))
    tokens = torch.randint(0, 128, (MAX_LEN,), generator=torch.Generator().manual_seed(5)).tolist()
    before = torch.get_num_threads()
    for parts in ([(513, 512)], [(510, 510), (90, 1)], [(518, 518)], [(1024, 1)]):
        slots = [rig.cache.take(tokens[:length]).slot for length, _ in parts]
        chunks = [Chunk(slot, 0, tokens[:n], wanted) for slot, (n, wanted) in zip(slots, parts, strict=True)]
        expected = rig.logits(*chunks)
        torch.set_num_threads(num_threads)
        try:
            torch.testing.assert_close(rig.logits(*chunks), expected, rtol=2e-2, atol=6e-2)
        finally:
            torch.set_num_threads(before)
        for slot in slots:
            rig.cache.release(slot)


def test_prompts_come_near_the_models_own_logits(rigs: Callable[..., Rig]) -> None:
    for name, config in CONFIGS.items():
        own = built(config(), torch.float32)
        rig = rigs(built(config(), torch.bfloat16))
        tokens = torch.randint(0, 128, (400,), generator=torch.Generator().manual_seed(2)).tolist()
        with torch.inference_mode():
            expected = own(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        result = rig.logits(Chunk(rig.cache.take(tokens).slot, 0, tokens, 1))[0]
        assert torch.nn.functional.cosine_similarity(result, expected, dim=0) > 0.98, name
        modules = rigs(built(config(), torch.bfloat16), "virtual", False)
        assert modules.stack is None
        by_modules = modules.logits(Chunk(modules.cache.take(tokens).slot, 0, tokens, 1))[0]
        assert torch.nn.functional.cosine_similarity(result, by_modules, dim=0) > 0.999, name


@pytest.mark.parametrize("of", ["model.layers.1", "model", "model.embed_tokens"])
def test_hooks_are_called(of: str, rigs: Callable[..., Rig]) -> None:
    """Before a model is put under a cache, and after."""
    calls: list[int] = []
    early = built(CONFIGS["llama"](), torch.float32)
    early.get_submodule(of).register_forward_hook(lambda *_: calls.append(1))
    rig = rigs(early)
    assert (rig.stack is None) == (of != "model.embed_tokens")
    late = rigs(built(CONFIGS["llama"](), torch.float32))
    assert late.stack is not None
    for used, added in ((rig, False), (late, True)):
        if added:
            used.runner._model.get_submodule(of).register_forward_pre_hook(lambda *_: calls.append(1))
        calls.clear()
        used.logits(Chunk(used.cache.take([5, 6]).slot, 0, [5, 6], 1))
        assert calls == [1]


def test_a_closed_runner_keeps_nothing(rigs: Callable[..., Rig]) -> None:
    rig = rigs(built(CONFIGS["llama"](), torch.float32))
    rig.runner.close()
    assert rig.stack is None


def test_models_that_do_more_between_their_layers_go_their_own_way(rigs: Callable[..., Rig]) -> None:
    """Gemma 2 scales its embeddings by itself; the others' layers are of other kinds."""
    for name in ("gemma2", "gpt2", "mixtral"):
        rig = rigs(ARCHITECTURES[name]())
        assert rig.stack is None, name
        tokens = PROMPTS[2]
        assert greedy(rig.runner, rig.cache, [tokens], 3) == generate(ARCHITECTURES[name](), [tokens], 3)


@pytest.mark.parametrize("scaling", ["dynamic", "linear", "yarn"])
def test_scaled_embeddings_are_the_models_own(scaling: str, rigs: Callable[..., Rig]) -> None:
    options: dict[str, Any] = {"rope_type": scaling, "factor": 4.0, "rope_theta": 10000.0}
    if scaling == "yarn":
        options["original_max_position_embeddings"] = 64
    rig = rigs(built(LlamaConfig(**LIKE_LLAMA, rope_parameters=options), torch.float32))
    assert rig.stack is not None
    tokens = torch.randint(0, 128, (90,), generator=torch.Generator().manual_seed(3)).tolist()
    slot = rig.cache.take(tokens).slot
    rig.logits(Chunk(slot, 0, tokens[:-1], 0))
    result = rig.logits(Chunk(slot, len(tokens) - 1, tokens[-1:], 1))
    rig.runner._stack = None
    torch.testing.assert_close(
        result, rig.logits(Chunk(slot, len(tokens) - 1, tokens[-1:], 1)), rtol=1e-5, atol=1e-5
    )


def test_embeddings_that_depend_on_the_rest_of_a_batch_are_in_no_table(rigs: Callable[..., Rig]) -> None:
    model = built(LlamaConfig(**LIKE_LLAMA), torch.float32)
    rotary = model.model.rotary_emb
    own = rotary.forward

    def stretched(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return own(x, position_ids=position_ids * 64 // (position_ids.max() + 1))

    rotary.forward = stretched
    assert rigs(model).stack is None


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_threads_do_not_change_a_bit(num_threads: int, rigs: Callable[..., Rig]) -> None:
    """With more threads than processors some always come too late for a section."""
    rig = rigs(built(CONFIGS["gemma3"](), torch.bfloat16))
    tokens = torch.randint(0, 128, (300,), generator=torch.Generator().manual_seed(4)).tolist()
    slot = rig.cache.take(tokens).slot
    chunks = Chunk(slot, 0, tokens, 1), Chunk(slot, 300, [5], 1)
    expected = [rig.logits(chunk) for chunk in chunks]
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for _ in range(3):
            assert all(torch.equal(rig.logits(chunk), own) for chunk, own in zip(chunks, expected, strict=True))
    finally:
        torch.set_num_threads(before)


class TestRotaryTables:
    def test_rows_are_those_computed_for_each_position(self) -> None:
        asked: list[int] = []
        parts: list[torch.Tensor] = []

        def compute(positions: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
            asked.extend(positions.tolist())
            parts.append(positions)
            wide = positions[:, None].float().expand(-1, 4)
            return [(wide, -wide), (2 * wide, 3 * wide)]

        tables = RotaryTables(compute, 5000)
        for positions in ([3, 0], [511], [512, 7], [4999, 1200]):
            assert _rows(tables.up_to(max(positions)), positions, 4) == [
                [[p] * 4 for p in positions],
                [[-p] * 4 for p in positions],
                [[2 * p] * 4 for p in positions],
                [[3 * p] * 4 for p in positions],
            ]
        assert asked == list(range(5000))
        assert all(len(part) <= 256 for part in parts)

    def test_positions_beyond_the_last_are_computed_as_they_come(self) -> None:
        tables = RotaryTables(lambda positions: [(positions[:, None].float(), -positions[:, None].float())], 8)
        assert _rows(tables.up_to(700), [700], 1) == [[[700]], [[-700]]]


def _rows(rotaries: Rotaries, positions: list[int], width: int) -> list[list[list[float]]]:
    """What is in the tables of float32 for these positions: of each cosines and sines."""
    assert rotaries.row_nbytes == 4 * width
    addresses = np.ctypeslib.as_array((ctypes.c_int64 * (2 * rotaries.num_tables)).from_address(rotaries.tables))
    rows = ctypes.c_float * width
    return [[list(rows.from_address(int(a) + p * rotaries.row_nbytes)) for p in positions] for a in addresses]
