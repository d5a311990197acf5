"""vattention beside vLLM, llama.cpp, OpenVINO GenAI and transformers, on the workloads w1 to w6.

    python -m benchmarks.peers --only w1,w2 --peers vllm,llamacpp --runs 3 --scale 0.5 --model demo

Each engine has a process of its own, which stays for all workloads of a round; engines take turns at each workload,
in an order that changes from round to round, and while one works the others sleep. What is done is kept in the JSON
file after each run, and the same command goes on from there; an engine that fails becomes a row that says why.
`python -m benchmarks.peers.install` installs them, `python -m benchmarks.peers.models` makes their models.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.peers.cases import Case, cases, longest
from benchmarks.peers.models import MODELS
from benchmarks.peers.plot import draw
from benchmarks.peers.report import to_markdown
from benchmarks.peers.rows import ROWS, Row, chosen
from benchmarks.peers.runs import Results
from benchmarks.peers.worker import RunError
from benchmarks.peers.workers import Workers

RESULTS = Path(__file__).resolve().parents[1] / "results"


def turns(number: int, rows: Sequence[Row]) -> list[Row]:
    """The order of run `number`: begun with another row each time, and every other time backwards."""
    begin = number % len(rows)
    order = [*rows[begin:], *rows[:begin]]
    return order[::-1] if number % 2 else order


def missing(
    wanted: Sequence[Case], rows: Sequence[Row], num_runs: int, results: Results
) -> Iterator[tuple[int, Case, Row]]:
    """What is still to be run, in order, with the number of its round."""
    for number in range(num_runs):
        for case in wanted:
            for row in turns(number, rows):
                if row.takes(case.workload) and len(results.runs(case.name, row.name)) <= number:
                    yield number, case, row


def measure(left: Sequence[tuple[int, Case, Row]], workers: Workers, results: Results, limit_s: float) -> None:
    """Run what is left until the time is over."""
    begun = time.monotonic()
    round_number = left[0][0] if left else 0
    for done, (number, case, row) in enumerate(left):
        since = time.monotonic()
        if since - begun > limit_s:
            print(f"{len(left) - done} of {len(left)} runs are left; the same command goes on with them")
            return
        if number != round_number:
            # Each round starts cold, and no cache holds prefixes of the one before.
            workers.close()
            round_number = number
        try:
            figures = workers.run(case, row)
            said = f"{figures[case.figure]:,.4g} {case.figure}"
        except RunError as error:
            figures, said = {"error": str(error)}, f"failed: {str(error).splitlines()[-1]}"
        results.add(case.name, row.name, figures)
        print(
            f"{done + 1} of {len(left)}: {case.name}, {row.name}: {said} ({time.monotonic() - since:.0f} s)",
            flush=True,
        )


def describe(results: Results, num_runs: int) -> str:
    """What the figures were measured on."""
    settings = ", ".join(f"{name} {value}" for name, value in results.conditions.items())
    return f"{settings}; at most {num_runs} interleaved runs; {datetime.now(UTC):%Y-%m-%d}."


def machine() -> str:
    """The processor, as the system names it."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare vattention with other engines.")
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--only", default="", help="workloads or cases with commas between them, such as 'w1,w6 16x1024'"
    )
    parser.add_argument("--peers", default="", help="engines with commas between them; ours always takes part")
    parser.add_argument("--rows", default="", help="rows by name with semicolons between them, ours only if named")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the requests of w1 and w4")
    parser.add_argument("--output", type=Path, help="without suffix; results/peers_MODEL by default")
    parser.add_argument("--limit-minutes", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--timeout-minutes", type=float, default=30.0, help="of one run")
    parser.add_argument("--retry-failed", action="store_true", help="run again what failed before")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    output = given.output or RESULTS / f"peers_{given.model.replace('-', '_')}"
    try:
        wanted = cases(_names(given.only, ","), given.scale)
        rows = chosen(_names(given.peers, ","), _names(given.rows, ";"))
        conditions = {"machine": machine(), "model": given.model, "scale": given.scale}
        results = Results(output.with_suffix(".json"), conditions)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if given.retry_failed:
        results.forget_failures()
    for environment in {row.environment.name: row.environment for row in rows}.values():
        results.add_installed(environment)
    workers = Workers(given.model, max(map(longest, cases((), given.scale))), given.timeout_minutes * 60)
    try:
        measure(list(missing(wanted, rows, given.runs, results)), workers, results, given.limit_minutes * 60)
    finally:
        workers.close()
    # Of all there is in the file, since engines and workloads can be measured at different times.
    every = cases((), given.scale)
    report = to_markdown(
        describe(results, given.runs), output.name, every, ROWS, results.runs, results.installed_bytes
    )
    output.with_suffix(".md").write_text(report)
    draw(every, ROWS, results.runs, given.model, output.with_suffix(".svg"))
    print(report)
    return 0


def _names(text: str, separator: str) -> list[str]:
    return [name.strip() for name in text.split(separator) if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
