"""A device that computes nothing, and knows how long it would have taken."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from vattention.bench.memory.shapes import ITEM_NBYTES, Device, ModelShape
from vattention.core import Chunk

VOCAB_SIZE = 4
EFFICIENCY = 0.7
"""Share of the device's peak rates that a forward reaches."""

SEQUENCE_S = 0.37e-3
"""Seconds of a step for each sequence in it, whatever it computes: scheduling, sampling, text.

Both are chosen so that OPT-13B in blocks of 16 on an A100 runs as many sequences at a time, at the PagedAttention
paper's rates of requests, as vLLM does there (figure 13): 30 of ShareGPT's at 2 requests per second and 132 of
Alpaca's at 30, which take steps of 45 and 76 ms.
"""


class Alike:
    """Predictions of a model that finds all tokens equally likely."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def logits(self, rows: Sequence[int]) -> torch.Tensor:
        """[len(rows), V] float32."""
        return torch.zeros(len(rows), VOCAB_SIZE)

    def likeliest(
        self, rows: Sequence[int], noise: NDArray[np.void] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Token 0, for each row."""
        return np.zeros(len(rows), np.int64), np.zeros(len(rows), np.float32)


class SimulatedDevice:
    """The engine's runner: greedily, every next token is token 0, and its clock goes on by the roofline's time.

    A forward takes the longer of reading weights, keys and values once, and two operations per weight and token;
    each sequence adds `SEQUENCE_S`.

    Attributes:
        now_s: simulated time, since the run's begin.
        lengths: tokens of each sequence after the latest forward.
    """

    def __init__(self, model: ModelShape, device: Device) -> None:
        self._weights_nbytes = model.num_params * ITEM_NBYTES
        self._token_nbytes = model.token_nbytes
        self._s_per_nbyte = 1 / (device.nbytes_per_s * EFFICIENCY)
        self._s_per_token = 2 * model.num_params / (device.flops * EFFICIENCY)
        self.now_s = 0.0
        self.lengths: list[int] = []

    def predict(self, chunks: Sequence[Chunk]) -> Alike:
        self.lengths = [chunk.end for chunk in chunks]
        num_tokens = sum([len(chunk.token_ids) for chunk in chunks])
        num_rows = sum([chunk.num_logits for chunk in chunks])
        reading_s = (self._weights_nbytes + sum(self.lengths) * self._token_nbytes) * self._s_per_nbyte
        self.now_s += max(reading_s, num_tokens * self._s_per_token) + len(chunks) * SEQUENCE_S
        return Alike(num_rows)

    def close(self) -> None:
        """There is nothing to give back."""
