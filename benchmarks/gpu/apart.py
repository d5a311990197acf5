"""Parts in a process that they may break: after a stray access a process can do nothing more on a GPU."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGUN = "begun"
"""In a report, the parts that its last process began."""


def measure_apart(command: Sequence[str], names: Sequence[str], path: Path, seconds: float) -> None:
    """Run the parts `names` by processes that end with the first part that fails, each going on behind the last.

    Args:
        command: begins a process, with the names and the seconds that are left as further options; it writes what
            it begins and what it finds to the report.
        path: of the report.
        seconds: no process is begun after so long.
    """
    end = time.monotonic() + seconds
    left = list(names)
    while left and time.monotonic() < end:
        remaining = f"{end - time.monotonic():.0f}"
        path.write_text(json.dumps(read(path) | {BEGUN: []}), encoding="utf-8")
        code = subprocess.run([*command, "--seconds", remaining, "--only", *left], check=False).returncode
        num_begun = len(read(path)[BEGUN])
        if num_begun == 0 and code == 0:
            return  # the time was over before its first part
        if num_begun == 0:
            raise SystemExit(f"a process began none of {', '.join(left)}, and ended with {code}")
        left = left[num_begun:]


def read(path: Path | None) -> dict[str, Any]:
    """What an earlier run wrote."""
    if path is None or not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
