"""The device that is measured, what it can do at best, and how time is taken on it."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from vattention.model.cuda_graphs import Capture, CudaCapture

GRAPH_COPIES_NBYTES = 256 * 2**20
"""What calls go over by turns: more than a GPU's last level of cache holds."""


@dataclass(frozen=True)
class Chart:
    """How to show a table: a line for each combination of what `lines` name, over x; bars where x are no numbers.

    Attributes:
        x, y: columns.
        lines: columns.
        aim: a line across.
    """

    x: str
    y: str
    lines: Sequence[str] = ()
    aim: float | None = None


@dataclass(frozen=True)
class Table:
    """What one part found; its title says the aim."""

    title: str
    rows: Sequence[dict[str, object]]
    chart: Chart | None = None

    def markdown(self) -> str:
        if not self.rows:
            return f"### {self.title}\n\nnothing was measured\n"
        names = [name for name, value in self.rows[0].items() if not isinstance(value, dict)]
        lines = [f"### {self.title}", "", f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
        lines += [f"| {' | '.join(_cell(row.get(name)) for name in names)} |" for row in self.rows]
        return "\n".join([*lines, ""])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


class Machine:
    """A device to measure.

    Args:
        device: "cuda", or "cpu" to try the code.
        tiny: sizes that a processor computes in seconds.
    """

    def __init__(self, device: str, tiny: bool) -> None:
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        )
        self.tiny = tiny
        self.dtype = torch.bfloat16 if self.is_gpu else torch.float32

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def free_nbytes(self) -> int:
        if not self.is_gpu:
            return 2**30
        self.give_back()
        return torch.cuda.mem_get_info(self.device)[0]

    def give_back(self) -> None:
        """Memory that torch keeps for its next tensors, and that of models which only refer to themselves."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()

    def capture(self) -> Capture | None:
        """Makes graphs, where there are any."""
        return CudaCapture(self.device) if self.is_gpu else None

    def wait(self) -> None:
        """Until the device has computed all it was told to."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], num_samples: int = 5) -> float:
        """Median time of a call, begun and ended on an idle device."""
        call()
        samples = []
        for _ in range(num_samples):
            self.wait()
            begin = time.perf_counter()
            call()
            self.wait()
            samples.append(time.perf_counter() - begin)
        return statistics.median(samples)

    def seconds_each(self, calls: Sequence[Callable[[], object]]) -> float:
        """Mean time of many short calls: on a GPU replayed from a graph, so that launching them costs nothing."""
        if not self.is_gpu:
            return self.seconds(lambda: [call() for call in calls]) / len(calls)
        replay = CudaCapture(self.device)(lambda: [call() for call in calls])
        return self.seconds(replay) / len(calls)

    @cached_property
    def copy_nbytes_per_s(self) -> float:
        """Bytes read plus bytes written of a copy on the device."""
        source = torch.empty(2**22 if self.tiny else 2**32, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.seconds(lambda: target.copy_(source))

    @cached_property
    def matrix_flops_per_s(self) -> float:
        """Of a large product of random square matrices in the type that models are measured in."""
        size = 128 if self.tiny else 8192
        a, b = (torch.randn(size, size, dtype=self.dtype, device=self.device) for _ in "ab")
        return 2 * size**3 / self.seconds(lambda: a @ b, 10)

    def ceilings(self) -> Table:
        row: dict[str, object] = {
            "copy, GB/s read and written": self.copy_nbytes_per_s / 1e9,
            f"{self.dtype} product, TFLOP/s": self.matrix_flops_per_s / 1e12,
        }
        return Table("Ceilings of this device, which the other figures are held against", [row])
