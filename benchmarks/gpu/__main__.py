"""Everything there is to measure on a GPU, in one run of less than nine minutes.

Parts are written down as they are done; a second run with the same file does those that are missing. They run in a
process of their own, and those behind one that fails in another.

    python -m benchmarks.gpu --json gpu.json                       # all parts
    python -m benchmarks.gpu --json gpu.json --only kernels decode # some, again
    python -m benchmarks.gpu --device cpu --tiny                   # tries the code; its figures mean nothing
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu import fusing, kernels, layouts, memory, overlap, prompt_kernels, steps, traces
from benchmarks.gpu.apart import BEGUN, measure_apart, read
from benchmarks.gpu.machine import Machine, Table
from benchmarks.mapping import surroundings

PARTS: dict[str, Callable[[Machine], Table]] = {
    "ceilings": Machine.ceilings,
    "driver": memory.driver,
    "kernels": kernels.decode,
    "decode": steps.decode,
    "layouts": layouts.layouts,
    "overlap": overlap.overlap,
    "prefill": steps.prefill,
    "prompts": prompt_kernels.prompts,
    "prefix": traces.prefix,
    "chats": traces.chats,
    "long": traces.long_prompts,
    "transformers": traces.beside_transformers,
    "swap": memory.swapping,
    "fusing": fusing.fusing,
}


MOST_SECONDS = 180
"""A part that takes longer hangs: its process ends, and says where it was."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes that a processor computes in seconds")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=None, help="these parts, even if they are done")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--seconds", type=float, default=350, help="no part is begun after so long")
    parser.add_argument("--here", action="store_true", help="in this process, up to the first part that fails")
    options = parser.parse_args(arguments)
    done = {name for name, part in read(options.json).get("parts", {}).items() if "rows" in part}
    names = [name for name in PARTS if (name in options.only if options.only else name not in done)]
    if options.here:
        _measure(names, options)
        return
    with TemporaryDirectory() as folder:
        path = options.json or Path(folder) / "report.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--here",
            "--device",
            options.device,
            "--json",
            str(path),
        ]
        measure_apart([*command, "--tiny"] if options.tiny else command, names, path, options.seconds)


def _measure(names: Sequence[str], options: argparse.Namespace) -> None:
    """Run parts and write them down, until one fails."""
    begin = time.perf_counter()
    machine = Machine(options.device, options.tiny)
    report = read(options.json) | {
        "date": date.today().isoformat(),
        "environment": surroundings(str(machine.device)),
        "tiny": options.tiny,
        BEGUN: [],
    }
    parts = report.setdefault("parts", {})
    for name in names:
        if time.perf_counter() - begin > options.seconds:
            print(f"{name}: left for another run, {options.seconds:.0f} s are over", flush=True)
            continue
        report[BEGUN].append(name)
        parts[name] = {"failed": "its process ended"}
        _write(report, options.json)
        faulthandler.dump_traceback_later(MOST_SECONDS, exit=True, file=2)
        parts[name] = _run(PARTS[name], machine)
        faulthandler.cancel_dump_traceback_later()
        print(parts[name].pop("text"), flush=True)
        _write(report, options.json)
        if "failed" in parts[name]:
            break


def _write(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _run(part: Callable[[Machine], Table], machine: Machine) -> dict[str, Any]:
    """A part's table, or what stopped it: the other parts are still worth their time."""
    begin = time.perf_counter()
    try:
        table = part(machine)
        if machine.is_gpu:
            torch.cuda.empty_cache()
    except Exception as error:
        traceback.print_exc()
        found: dict[str, Any] = {"failed": repr(error), "text": f"{part.__qualname__} failed: {error!r}\n"}
    else:
        found = {**asdict(table), "text": table.markdown()}
    return found | {"seconds": time.perf_counter() - begin}


if __name__ == "__main__":
    main()
