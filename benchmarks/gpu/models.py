"""Models of known shapes with random weights, served on the device that is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from benchmarks.gpu.machine import Machine
from vattention.config import EngineConfig
from vattention.engine.engine import LLMEngine
from vattention.engine.parts import Parts
from vattention.kv.build import create_manager
from vattention.kv.manager import KVManager
from vattention.model.decode_graphs import CaptureReport
from vattention.model.optimize import optimize
from vattention.model.probe import probe
from vattention.model.rope import fix_rope
from vattention.model.runner import ModelRunner

LLAMA = "Llama 3 8B"
QWEN = "Qwen3 0.6B"

_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512, "head_dim": 16}
_SHAPES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    LLAMA: (
        LlamaConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "vocab_size": 128256,
            "head_dim": 128,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": False,
        },
    ),
    QWEN: (
        Qwen3Config,
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "vocab_size": 151936,
            "head_dim": 128,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
}


class RandomModel(NamedTuple):
    """A model of random weights.

    Attributes:
        step_nbytes: weights that a decode step reads: an embedding table that is not the output layer too is not.
        num_layer_weights: numbers in the weights of all decoder layers.
    """

    model: PreTrainedModel
    step_nbytes: int
    num_layer_weights: int


def random_model(shape: str, machine: Machine, *, optimized: bool = True) -> RandomModel:
    """
    Args:
        optimized: as engines do it.
    """
    kind, options = _SHAPES[shape]
    if machine.tiny:
        options = {**options, **_TINY, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = kind(**options, max_position_embeddings=2**17)
    with machine.device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=machine.dtype)
    model.eval().requires_grad_(False)
    tables = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is tables
    nbytes = sum(p.nbytes for p in model.parameters())
    found = RandomModel(
        model,
        nbytes if tied else nbytes - int(tables.nbytes),
        sum(p.numel() for p in model.get_decoder().layers.parameters()),
    )
    if optimized:
        optimize(model)
    return found


@dataclass(frozen=True)
class Served:
    """A model over a cache of its own, and what capturing its decode steps took."""

    random: RandomModel
    manager: KVManager
    runner: ModelRunner
    parts: Parts
    captured: CaptureReport | None

    @property
    def token_nbytes(self) -> int:
        """Of one token's keys and values in all layers."""
        size = self.random.model.dtype.itemsize
        return sum(size * s.num_kv_heads * (s.key_dim + s.value_dim) for s in self.parts.cache_specs)


@contextmanager
def served(machine: Machine, random: RandomModel, config: EngineConfig, max_len: int) -> Iterator[Served]:
    # What torch keeps of models before is not there for a cache.
    machine.give_back()
    model = random.model
    fix_rope(model, max_len)
    attention = probe(model)
    specs = attention.cache_specs
    capture = None if config.enforce_eager else machine.capture()
    manager = create_manager(
        config if capture is None else replace(config, max_num_seqs=config.max_num_seqs + 1),
        specs,
        dtype=machine.dtype,
        device=str(machine.device),
        max_len=max_len,
    )
    try:
        runner = ModelRunner(model, attention, manager, config.attention)
        captured = None
        try:
            if capture is not None and runner.uncapturable is None:
                captured = runner.capture(capture)
                manager.refresh_limit()
            parts = Parts(
                name=config.model,
                manager=manager,
                runner=runner,
                tokenizer=None,
                vocab_size=model.config.vocab_size,
                max_model_len=max_len,
                end_token_ids=frozenset(),
                default_sampling={},
                cache_specs=specs,
            )
            yield Served(random, manager, runner, parts, captured)
        finally:
            runner.close()
    finally:
        machine.wait()
        manager.close()


@contextmanager
def engine(machine: Machine, random: RandomModel, config: EngineConfig, max_len: int) -> Iterator[LLMEngine]:
    with served(machine, random, config, max_len) as running:
        yield LLMEngine(config, running.parts)


def configured(machine: Machine, **options: Any) -> EngineConfig:
    """Options of an engine, with little memory where the machine is only tried."""
    return EngineConfig(model="random", kv_memory="256MiB" if machine.tiny else None, **options)
