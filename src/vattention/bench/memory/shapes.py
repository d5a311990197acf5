"""Published shapes of real models and devices, and the memory that is left for keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from vattention.core import AttentionSpec
from vattention.errors import ConfigError

ITEM_NBYTES = 2
"""Weights, keys and values are 16-bit numbers."""

USABLE = 0.9
"""Share of a device's memory for weights and KV cache; the rest is for activations and the driver."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What memory management sees of a model.

    Attributes:
        num_params: of all weights.
        max_len: the context in tokens.
        window: of the layers with a sliding window; the others see everything.
        full_every: every so-many-th layer has no window.
    """

    name: str
    num_params: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_len: int
    window: int | None = None
    full_every: int = 1

    @property
    def specs(self) -> list[AttentionSpec]:
        """One per layer."""
        return [
            AttentionSpec(
                self.num_heads,
                self.num_kv_heads,
                self.head_dim,
                self.head_dim,
                self.head_dim**-0.5,
                window=None if (layer + 1) % self.full_every == 0 else self.window,
            )
            for layer in range(self.num_layers)
        ]

    @property
    def token_nbytes(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * ITEM_NBYTES


@dataclass(frozen=True, slots=True)
class Device:
    """Attributes:
    nbytes: of memory.
    nbytes_per_s: memory bandwidth.
    flops: dense 16-bit operations per second.
    """

    name: str
    nbytes: int
    nbytes_per_s: float
    flops: float


OPT_13B = ModelShape("OPT-13B", 12_853_473_280, 40, 40, 40, 128, 2048)
LLAMA_13B = ModelShape("LLaMA-13B", 13_015_864_320, 40, 40, 40, 128, 2048)
LLAMA_3_8B = ModelShape("Llama-3-8B", 8_030_261_248, 32, 32, 8, 128, 8192)
YI_34B = ModelShape("Yi-34B", 34_388_917_248, 60, 56, 8, 128, 4096)
YI_6B = ModelShape("Yi-6B", 6_061_035_520, 32, 32, 4, 128, 4096)
GEMMA_3_270M = ModelShape("Gemma 3 270M", 268_098_176, 18, 4, 1, 256, 32_768, window=512, full_every=6)
"""From the models' published configurations."""

A100_40 = Device("A100 40 GB", 40 * 2**30, 1.555e12, 312e12)
A100_80 = Device("A100 80 GB", 80 * 2**30, 2.039e12, 312e12)
HOST = Device("host with 1 GiB", 2**30, 50e9, 2e12)
"""A small host: what it gives to weights and cache, and the rates of a few server cores."""


def kv_nbytes(model: ModelShape, device: Device) -> int:
    """Memory for keys and values beside the weights.

    Raises:
        ConfigError: the weights leave nothing.
    """
    weights = model.num_params * ITEM_NBYTES
    left = int(device.nbytes * USABLE) - weights
    if left <= 0:
        raise ConfigError(
            f"{model.name} needs {weights:,} bytes for its weights, and {USABLE:.0%} of {device.name} is "
            f"{int(device.nbytes * USABLE):,}; choose a larger device"
        )
    return left
