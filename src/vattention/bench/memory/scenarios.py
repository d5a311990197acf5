"""The loads and machines that are simulated, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vattention.bench.memory.shapes import (
    A100_40,
    A100_80,
    GEMMA_3_270M,
    HOST,
    LLAMA_3_8B,
    LLAMA_13B,
    OPT_13B,
    YI_34B,
    Device,
    ModelShape,
)
from vattention.bench.memory.trace import ALPACA, SHAREGPT, Dataset, Trace, draw_trace
from vattention.bench.memory.variants import (
    ON_A_GPU,
    ON_A_HOST,
    ON_THE_PAPERS_GPU,
    SHARING_ON_A_GPU,
    SHARING_ON_A_HOST,
    Variant,
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A model on a device under a load.

    Attributes:
        requests_per_s: PagedAttention's where it has the scenario (figure 13), else more than the device can serve,
            so that memory bounds the batch.
        num_requests: enough to fill the cache some times over.
        max_num_seqs: slots.
    """

    model: ModelShape
    device: Device
    dataset: Dataset
    requests_per_s: float
    num_requests: int
    variants: tuple[Variant, ...]
    max_num_seqs: int = 256

    @property
    def name(self) -> str:
        return f"{self.model.name}, {self.device.name}, {self.dataset.name}, {self.requests_per_s:g} requests/s"

    def trace(self, seed: int, *, scale: float = 1.0, n: int = 1) -> Trace:
        """Its requests, for n samples each.

        Args:
            scale: of the number of requests.
        """
        count = max(round(self.num_requests * scale), 4)
        return draw_trace(self.dataset, count=count, requests_per_s=self.requests_per_s / n, seed=seed)


PAPER_SHAREGPT = Scenario(OPT_13B, A100_40, SHAREGPT, 2, 600, ON_THE_PAPERS_GPU)
PAPER_ALPACA = Scenario(OPT_13B, A100_40, ALPACA, 30, 2400, ON_THE_PAPERS_GPU)
PAPER_PREFIX = Scenario(LLAMA_13B, A100_40, SHAREGPT, 2, 500, ON_A_GPU)
"""Those of PagedAttention's paper; the last for its size alone (figure 16)."""

ON_HOST = Scenario(replace(GEMMA_3_270M, max_len=2048), HOST, SHAREGPT, 4, 300, ON_A_HOST)

SHARING = (
    (PAPER_ALPACA, SHARING_ON_A_GPU),
    (PAPER_SHAREGPT, SHARING_ON_A_GPU),
    (ON_HOST, SHARING_ON_A_HOST),
)
"""Where sharing is measured, and whose."""

SCENARIOS = (
    PAPER_SHAREGPT,
    PAPER_ALPACA,
    Scenario(LLAMA_3_8B, A100_40, SHAREGPT, 40, 1600, ON_A_GPU, max_num_seqs=512),
    Scenario(LLAMA_3_8B, A100_80, SHAREGPT, 80, 4000, ON_A_GPU, max_num_seqs=1024),
    Scenario(YI_34B, A100_80, SHAREGPT, 10, 500, ON_A_GPU),
    ON_HOST,
)
