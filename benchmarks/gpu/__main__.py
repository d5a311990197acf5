"""Everything there is to measure on a GPU, in one run of less than nine minutes.

Parts are written down as they are done; a second run with the same file does those that are missing.

    python -m benchmarks.gpu --json gpu.json                       # all parts
    python -m benchmarks.gpu --json gpu.json --only kernels decode # some, again
    python -m benchmarks.gpu --device cpu --tiny                   # tries the code; its figures mean nothing
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import compiled, kernels, memory, overlap, steps, traces
from benchmarks.gpu.machine import Machine, Table
from benchmarks.mapping import surroundings

PARTS: dict[str, Callable[[Machine], Table]] = {
    "ceilings": Machine.ceilings,
    "driver": memory.driver,
    "kernels": kernels.measure,
    "decode": steps.decode,
    "overlap": overlap.overlap,
    "prefill": steps.prefill,
    "swap": memory.swapping,
    "prefix": traces.prefix,
    "serving": traces.serving,
    "compile": compiled.compiled,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes that a processor computes in seconds")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=None, help="these parts, even if they are done")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--seconds", type=float, default=500, help="no part is begun after so long")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    machine = Machine(options.device, options.tiny)
    report = _read(options.json) | {
        "date": date.today().isoformat(),
        "environment": surroundings(str(machine.device)),
        "tiny": options.tiny,
    }
    parts = report.setdefault("parts", {})
    for name, part in PARTS.items():
        if (name not in options.only) if options.only else "rows" in parts.get(name, {}):
            continue
        if time.perf_counter() - begin > options.seconds:
            print(f"{name}: left for another run, {options.seconds:.0f} s are over", flush=True)
            continue
        parts[name] = _run(part, machine)
        print(parts[name].pop("text"), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _run(part: Callable[[Machine], Table], machine: Machine) -> dict[str, Any]:
    """A part's table, or what stopped it: the other parts are still worth their time."""
    begin = time.perf_counter()
    try:
        table = part(machine)
    except Exception as error:
        found: dict[str, Any] = {"failed": repr(error), "text": f"{part.__qualname__} failed: {error!r}\n"}
    else:
        found = {**asdict(table), "text": table.markdown()}
    if machine.is_gpu:
        torch.cuda.empty_cache()
    return found | {"seconds": time.perf_counter() - begin}


def _read(path: Path | None) -> dict[str, Any]:
    """What an earlier run wrote."""
    if path is None or not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
