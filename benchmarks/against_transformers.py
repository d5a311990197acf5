"""vattention against transformers' `generate` in a padded batch, on the workloads w1 to w6.

    python -m benchmarks.against_transformers --model demo --runs 3 --only w1,w2

Every run is a process of its own, so that a peak of memory belongs to one side; the sides take turns, and which one
begins changes from run to run. Medians, the spread over the runs, and the factor between the sides go to
benchmarks/results/ as JSON and as a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import workloads
from benchmarks.workloads import Request

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

Figures = dict[str, Any]
"""What one side writes after one run."""


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table.

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
    def higher_is_better(self) -> bool:
        return self.figure.endswith("_per_s")


def cases(only: Sequence[str], scale: float) -> list[Case]:
    """The workloads, those in `only` if it names any. `scale` below 1 takes fewer requests, never shorter ones."""

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
    return [case for case in made if not only or case.name.split()[0] in only]


def run_side(command: Sequence[str], requests: list[Request]) -> Figures:
    """Run one side's benchmark in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        work, out = Path(folder, "requests.jsonl"), Path(folder, "figures.json")
        work.write_text("".join(json.dumps(request) + "\n" for request in requests))
        done = subprocess.run(
            [sys.executable, "-m", *command, "--requests", str(work), "--json", str(out)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        figures: Figures = json.loads(out.read_text())
        return figures


def run_case(case: Case, command: Sequence[str]) -> Figures:
    """One run of one side; a decode rate needs two."""
    figures = run_side(command, case.requests)
    if case.first_token_only is not None:
        first = run_side(command, case.first_token_only)
        num_tokens = figures["num_output_tokens"] - first["num_output_tokens"]
        figures["decode_tokens_per_s"] = num_tokens / (figures["elapsed_s"] - first["elapsed_s"])
    return figures


def compare(case: Case, ours: Sequence[Figures], theirs: Sequence[Figures]) -> dict[str, Any]:
    """Medians and spreads of both sides' runs; `factor` says how many times better ours is."""
    sides = {"vattention": _spread(case.figure, ours), "transformers": _spread(case.figure, theirs)}
    factor = sides["vattention"]["median"] / sides["transformers"]["median"]
    return {
        "workload": case.name,
        "figure": case.figure,
        "factor": factor if case.higher_is_better else 1 / factor,
        **sides,
        "runs": {"vattention": list(ours), "transformers": list(theirs)},
    }


def _spread(figure: str, runs: Sequence[Figures]) -> dict[str, float]:
    values = [run[figure] for run in runs]
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
    }


def to_markdown(machine: str, rows: Sequence[dict[str, Any]]) -> str:
    """The table, with medians and in brackets the smallest and largest run."""
    lines = [
        machine,
        "",
        "| workload | figure | vattention | transformers | times better | peak memory (MiB) |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        ours, theirs = row["vattention"], row["transformers"]
        lines.append(
            f"| {row['workload']} | {row['figure']} | {_cell(ours)} | {_cell(theirs)} | {row['factor']:.2f} "
            f"| {ours['peak_rss_bytes'] / 2**20:,.0f} / {theirs['peak_rss_bytes'] / 2**20:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def _cell(side: dict[str, float]) -> str:
    return f"{side['median']:,.4g} ({side['min']:,.4g} to {side['max']:,.4g})"


def describe_machine(figures: Figures, arguments: argparse.Namespace) -> str:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    versions = ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
    return (
        f"{cpu}, {len(os.sched_getaffinity(0))} cores; {versions}; model {arguments.model}; "
        f"medians of {arguments.runs} runs, in brackets the smallest and the largest."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare vattention with transformers' generate.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="", help="workloads with commas between them, such as w1,w6")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the requests to take, for slow machines")
    parser.add_argument("--batch-size", type=int, help="transformers' requests per batch; all of them by default")
    parser.add_argument("--output", type=Path, default=RESULTS / "against_transformers")
    arguments = parser.parse_args()
    batch_size = [] if arguments.batch_size is None else ["--batch-size", str(arguments.batch_size)]
    commands = {
        "vattention": ["vattention", "bench", "throughput", arguments.model],
        "transformers": ["benchmarks.transformers_generate", arguments.model, *batch_size],
    }
    chosen = cases([name for name in arguments.only.split(",") if name], arguments.scale)
    results: dict[str, dict[str, list[Figures]]] = {case.name: {side: [] for side in commands} for case in chosen}
    for run in range(arguments.runs):
        for case in chosen:
            for side in sorted(commands, reverse=run % 2 == 0):
                figures = run_case(case, commands[side])
                results[case.name][side].append(figures)
                print(f"run {run + 1}: {case.name}, {side}: {figures[case.figure]:,.4g} {case.figure}", flush=True)
    rows = [compare(c, results[c.name]["vattention"], results[c.name]["transformers"]) for c in chosen]
    machine = describe_machine(results[chosen[0].name]["vattention"][0], arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(
        json.dumps({"machine": machine, "cases": rows}, indent=2) + "\n"
    )
    table = to_markdown(machine, rows)
    arguments.output.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
