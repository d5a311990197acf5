"""A device that computes nothing, and knows how long it would have taken."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vattention.bench.memory.shapes import ITEM_NBYTES, Device, ModelShape
from vattention.core import Chunk

VOCAB_SIZE = 4
EFFICIENCY = 0.4
"""Share of the device's peak rates that a forward reaches. Chosen so that OPT-13B on an A100 runs about as many
sequences at two requests per second as in the PagedAttention paper: a forward takes 40 to 60 ms."""


class SimulatedDevice:
    """The engine's runner: every next token is token 0, and its clock goes on by the roofline's time.

    A forward takes the longer of reading weights, keys and values once, and two operations per weight and token.

    Attributes:
        now_s: simulated time, since the run's begin.
        lengths: tokens of each sequence after the latest forward.
    """

    def __init__(self, model: ModelShape, device: Device) -> None:
        self._weights_nbytes = model.num_params * ITEM_NBYTES
        self._token_nbytes = model.token_nbytes
        self._s_per_nbyte = 1 / (device.nbytes_per_s * EFFICIENCY)
        self._s_per_token = 2 * model.num_params / (device.flops * EFFICIENCY)
        self._logits = torch.zeros(0, VOCAB_SIZE)
        self.now_s = 0.0
        self.lengths: list[int] = []

    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        self.lengths = [chunk.end for chunk in chunks]
        num_tokens = sum([len(chunk.token_ids) for chunk in chunks])
        num_rows = sum([chunk.num_logits for chunk in chunks])
        reading_s = (self._weights_nbytes + sum(self.lengths) * self._token_nbytes) * self._s_per_nbyte
        self.now_s += max(reading_s, num_tokens * self._s_per_token)
        if num_rows > len(self._logits):
            self._logits = torch.zeros(2 * num_rows, VOCAB_SIZE)
        return self._logits[:num_rows]

    def close(self) -> None:
        """There is nothing to give back."""
