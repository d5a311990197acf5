"""Resident memory of this process, as the kernel counts it: memory behind the KV cache included."""

from __future__ import annotations

import re
from pathlib import Path

from vattention.errors import ConfigError


def resident_nbytes() -> int:
    """Resident memory now."""
    return _status("VmRSS")


def peak_resident_nbytes() -> int:
    """Most resident memory since the program began. Unlike `ru_maxrss` it does not inherit the parent's."""
    return _status("VmHWM")


def _status(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise ConfigError(f"/proc/self/status has no {name}; benchmarks need a Linux /proc")
    return int(found[1]) * 1024
