"""How much memory a KV cache on the host may still take.

Nothing else guards it: inside a container neither reserving nor committing reports a shortage, the kernel kills.
`MemFree` is the wrong figure, since the page cache fills it by design; so is `MemAvailable` alone, since control
groups allow less. The figure here is the least of what the machine and every control group above this process
have to spare, minus a reserve.

The files behind this process's mappings need care: model weights are usually mapped, the kernel counts their pages
as reclaimable, and yet every step reads them all. What is counted as free is never a page of those.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from vattention.memory.driver import MemoryInfo

RESERVE_NBYTES = 2**30
RESERVE_FRACTION = 0.1
"""The reserve is the smaller of the two: activations, and what other programs will want soon."""


def memory_info(root: Path = Path("/")) -> MemoryInfo:
    """Memory that can be had and memory there is, for this process, in bytes.

    Args:
        root: where `proc` and the control group file systems are found.
    """
    machine = _fields(root / "proc/meminfo", unit=1024)
    mapped = _fields(root / "proc/self/status", unit=1024).get("RssFile", 0)
    total = machine["MemTotal"]
    cached = machine.get("Active(file)", 0) + machine.get("Inactive(file)", 0)
    available = machine["MemAvailable"] - min(mapped, cached)
    for directory in control_groups(root):
        limit = _limit(directory)
        usage = _number(directory, "memory.current", "memory.usage_in_bytes")
        if limit is None or usage is None:
            continue
        statistics = _fields(directory / "memory.stat", unit=1)
        inactive = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
        available = min(available, limit - usage + inactive - min(mapped, inactive))
        total = min(total, limit)
    reserve = min(RESERVE_NBYTES, int(total * RESERVE_FRACTION))
    return MemoryInfo(max(available - reserve, 0), total)


def control_groups(root: Path = Path("/")) -> Iterator[Path]:
    """The directories of all control groups that limit this process's memory, versions 1 and 2, innermost first."""
    paths = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            paths["cgroup2"] = PurePosixPath(group)
        elif "memory" in controllers.split(","):
            paths["cgroup"] = PurePosixPath(group)
    for line in _lines(root / "proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind not in paths or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        mounted, mount_point = left.split(" ")[3:5]
        top = root / mount_point.lstrip("/")
        # Inside a container the group's path may lie outside of what is mounted; then all there is is the top.
        path = paths[kind]
        inside = path.relative_to(mounted) if path.is_relative_to(mounted) else PurePosixPath()
        for part in (inside, *inside.parents) if inside.parts else (inside,):
            yield top / part


def _limit(directory: Path) -> int | None:
    """The lowest limit of one control group. Above `memory.high` the kernel throttles, which is no better."""
    limits = (
        _number(directory, "memory.max", "memory.limit_in_bytes"),
        _number(directory, "memory.high"),
    )
    return min((limit for limit in limits if limit is not None), default=None)


def _number(directory: Path, *names: str) -> int | None:
    """What the first of these files that exists says; None where there is none, or it says "max"."""
    for name in names:
        for line in _lines(directory / name):
            return int(line) if line.strip().isdigit() else None
    return None


def _fields(path: Path, *, unit: int) -> dict[str, int]:
    """Numbers by name, from lines such as "MemTotal: 24684096 kB" or "inactive_file 6537216"."""
    fields = {}
    for line in _lines(path):
        name, *rest = line.split()
        if rest and rest[0].isdigit():
            fields[name.rstrip(":")] = int(rest[0]) * unit
    return fields


def _lines(path: Path) -> list[str]:
    """Lines of a file that say anything; none where it does not exist, as the root group has no limit file."""
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return []
