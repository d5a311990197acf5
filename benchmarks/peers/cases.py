"""The workloads as comparisons: what work, and which figure of it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import workloads
from benchmarks.workloads import Request

Figures = dict[str, Any]
"""What an engine's script writes after one run."""


@dataclass(frozen=True, slots=True)
class Case:
    """One table.

    Attributes:
        figure: what is compared: a key of `Figures`.
        requests: the work.
    """

    name: str
    figure: str
    requests: list[Request]

    @property
    def workload(self) -> str:
        return self.name.split()[0]

    @property
    def higher_is_better(self) -> bool:
        return self.figure.endswith("_per_s")

    @property
    def greedy(self) -> bool:
        return bool(self.requests[0]["temperature"] == 0)


def cases(only: Sequence[str], scale: float) -> list[Case]:
    """The workloads, those in `only` if it names any. `scale` below 1 takes fewer requests, never shorter ones.

    Raises:
        ValueError: `only` names a workload that there is not.
    """
    if unknown := set(only) - set(workloads.WORKLOADS):
        raise ValueError(f"{', '.join(sorted(unknown))}: the workloads are {', '.join(workloads.WORKLOADS)}")

    def fewer(count: int) -> int:
        return max(1, round(count * scale))

    made = [
        Case("w1", "output_tokens_per_s", workloads.w1(fewer(64))),
        Case("w2", "output_tokens_per_s", workloads.w2()),
        Case("w3", "ttft_p50_s", workloads.w3()),
        Case("w4", "total_tokens_per_s", workloads.w4(fewer(32))),
        Case("w5", "output_tokens_per_s", workloads.w5()),
        *(
            # The median: a rate from whole runs would mostly measure their prompts.
            Case(f"w6 {batch}x{context}", "itl_p50_s", workloads.w6(batch, context))
            for batch in sorted({fewer(batch) for batch in workloads.W6_BATCHES})
            for context in workloads.W6_CONTEXTS
        ),
    ]
    return [case for case in made if not only or case.workload in only]
