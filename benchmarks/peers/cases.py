"""The workloads as comparisons: what work, which figure of it counts, and what is aimed at."""

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
    def greedy(self) -> bool:
        return bool(self.requests[0]["temperature"] == 0)


@dataclass(frozen=True, slots=True)
class Aim:
    """How many times better than the best of the others vattention is to be, in a figure of a workload."""

    workload: str
    figure: str
    times: float


AIMS = (
    Aim("w1", "output_tokens_per_s", 1.3),
    Aim("w2", "output_tokens_per_s", 1.25),
    Aim("w2", "ttft_p50_s", 1.1),
    Aim("w3", "ttft_p50_s", 1.1),
    Aim("w4", "total_tokens_per_s", 1.1),
    Aim("w5", "output_tokens_per_s", 1.3),
    Aim("w6", "itl_p50_s", 1.0),
)


@dataclass(frozen=True, slots=True)
class Column:
    """A figure of a case, as summaries have it."""

    case: Case
    aim: Aim

    @property
    def title(self) -> str:
        return f"{self.case.name} {TITLES[self.aim.figure]}"


TITLES = {
    "output_tokens_per_s": "tokens/s",
    "total_tokens_per_s": "tokens/s",
    "ttft_p50_s": "TTFT, s",
    "itl_p50_s": "ITL, s",
}
"""Figures in few words. Total tokens are those of prompts too."""


def columns(cases: Sequence[Case]) -> list[Column]:
    """A column for each aim of each case."""
    return [Column(case, aim) for case in cases for aim in AIMS if aim.workload == case.workload]


def longest(case: Case) -> int:
    """Tokens of a case's longest prompt with its output."""
    return max(len(request["prompt_token_ids"]) + int(request["max_tokens"]) for request in case.requests)


def higher_is_better(figure: str) -> bool:
    return figure.endswith("_per_s")


def cases(only: Sequence[str], scale: float) -> list[Case]:
    """The workloads, or the cases of them, that `only` names; all if it names none.

    Args:
        only: names such as w1, w6 and "w6 16x1024".
        scale: share of the requests in w1 and w4; below 1 there are fewer, never shorter ones.

    Raises:
        ValueError: `only` names what there is not.
    """

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
            for batch in workloads.W6_BATCHES
            for context in workloads.W6_CONTEXTS
        ),
    ]
    names = {case.workload for case in made} | {case.name for case in made}
    if unknown := set(only) - names:
        raise ValueError(f"{', '.join(sorted(unknown))}: there are {', '.join(sorted(names))}")
    return [case for case in made if not only or case.workload in only or case.name in only]
