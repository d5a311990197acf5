"""`vattention info`: what this machine can do."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from vattention.cli.sizes import size
from vattention.errors import VAttentionError

CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")
"""Those that decide how fast matrices multiply, as /proc/cpuinfo names them."""

LIBRARIES = ("torch", "transformers", "numpy", "safetensors", "cuda-bindings", "gguf")

DEVICES = ("cpu", "cuda")

Facts = dict[str, dict[str, Any]]
"""Topic to name to value."""


def info(*, as_json: Annotated[bool, Parameter(name="--json", negative=())] = False) -> None:
    """Show what this machine can do.

    Args:
        as_json: write JSON, with all sizes in bytes.
    """
    facts = collect()
    print(json.dumps(facts, indent=2) if as_json else render(facts))


def collect() -> Facts:
    """Look at the machine. Opens each driver there may be, and gives it back."""
    from vattention import __version__

    return {
        "versions": {
            "vattention": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in LIBRARIES},
        },
        "cpu": cpu(),
        "memory": memory(),
        "kernels": kernels(),
        **{f"driver for {device}": driver(device) for device in DEVICES},
    }


def cpu() -> dict[str, Any]:
    """Its name, the cores this process may use, and the features that matter here."""
    fields = _colon_file(Path("/proc/cpuinfo"))
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "name": fields.get("model name") or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "features": [name for name in CPU_FEATURES if name in flags],
    }


def memory() -> dict[str, Any]:
    """The system's memory in bytes, whatever this process may use of it, and the bound on its mappings."""
    fields = _colon_file(Path("/proc/meminfo"))
    sizes = {"total_nbytes": "MemTotal", "free_nbytes": "MemFree", "available_nbytes": "MemAvailable"}
    return {
        **{name: int(fields[key].removesuffix(" kB")) * 1024 for name, key in sizes.items()},
        "max_map_count": int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii")),
    }


def kernels() -> dict[str, Any]:
    """Attention kernels that run here, the first choice first; and whether the C kernels were built and can run."""
    from vattention.attention.registry import runnable
    from vattention.native import kernels as compiled_kernels

    on_gpus = runnable("cuda")
    return {
        "attention": runnable("cpu"),
        **({"attention_on_cuda": on_gpus} if on_gpus else {}),
        "compiled": compiled_kernels() is not None,
    }


def driver(device: str) -> dict[str, Any]:
    """What a driver can do, and the memory it would give a KV cache now; or why there is none."""
    from vattention.memory import open_driver

    try:
        opened = open_driver(device)
    except VAttentionError as error:
        return {"missing": str(error)}
    try:
        capabilities = dataclasses.asdict(opened.capabilities)
        found = opened.memory_info()
        return {
            "name": capabilities.pop("name"),
            "budget_nbytes": found.available_nbytes,
            "limit_nbytes": found.total_nbytes,
            "page_nbytes": opened.page_nbytes,
            "granularity_nbytes": capabilities.pop("granularity"),
            **capabilities,
        }
    finally:
        opened.close()


def render(facts: Facts) -> str:
    """One topic after another, sizes in units for people."""
    lines = []
    for topic, values in facts.items():
        lines.append(topic)
        for name, value in values.items():
            label = name.removesuffix("_nbytes").replace("_", " ")
            lines.append(f"  {label:<18} {size(value) if name.endswith('_nbytes') else _text(value)}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _colon_file(path: Path) -> dict[str, str]:
    """The first value of each name in a file of "name : value" lines."""
    fields: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields
