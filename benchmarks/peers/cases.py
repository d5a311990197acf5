"""The workloads as comparisons: what work, and which figure of it counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        figure: what is compared: a key of `Figures`, or "decode_tokens_per_s".
        requests: the work.
        first_token_only: for a decode rate, the same work with one token each.
    """

    name: str
    figure: str
    requests: list[Request]
    first_token_only: list[Request] | None = None

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
            Case(
                f"w6 {batch}x{context}",
                "decode_tokens_per_s",
                workloads.w6(batch, context),
                workloads.w6(batch, context, out=1),
            )
            for batch in sorted({fewer(batch) for batch in workloads.W6_BATCHES})
            for context in workloads.W6_CONTEXTS
        ),
    ]
    return [case for case in made if not only or case.workload in only]


def decode_rate(whole: Mapping[str, Any], first: Mapping[str, Any]) -> float:
    """Tokens per second after the first of each sequence, from the run with all tokens and the one with one each.

    Raises:
        ValueError: the longer run took no longer, so the machine was not still enough to say.
    """
    extra_s = whole["elapsed_s"] - first["elapsed_s"]
    if extra_s <= 0:
        raise ValueError(
            f"the run with all tokens was {-extra_s:.2f} s shorter than the one with first tokens only"
        )
    return float((whole["num_output_tokens"] - first["num_output_tokens"]) / extra_s)
