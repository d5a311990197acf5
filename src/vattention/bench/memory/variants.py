"""The managers that are compared, as data: a new one is a line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Variant:
    """A memory manager with its options.

    Attributes:
        name: in tables.
        options: of `EngineConfig`.
        paper: what the PagedAttention paper calls it, to find its figures; None where it has none.
    """

    name: str
    options: Mapping[str, Any]
    paper: str | None = None


NOTHING_CACHED: Mapping[str, Any] = {"enable_prefix_caching": False}
"""Of `EngineConfig`, where a variant says nothing of it: requests share nothing unless that is measured."""


def virtual(page_size: str, kv_layout: str) -> Variant:
    """This project's manager."""
    return Variant(
        f"virtual, {page_size} pages, {kv_layout}",
        {"kv": "virtual", "page_size": page_size, "kv_layout": kv_layout},
    )


HOST = virtual("4KiB", "per-layer")
"""A host's smallest pages, and the default layout."""

GPU = virtual("2MiB", "sliced")
"""A GPU's smallest pages with its stock driver."""

GPU_PER_LAYER = virtual("2MiB", "per-layer")
"""The same without slicing: a page of each layer's K and V for every sequence."""

PAGED = Variant("paged, blocks of 16", {"kv": "paged", "block_size": 16, "page_size": "2MiB"}, paper="vLLM")
PAGED_HOST = replace(PAGED, options={**PAGED.options, "page_size": "4KiB"})
"""PagedAttention with vLLM's block size."""


def reserved(reservation: str, paper: str, page_size: str = "2MiB") -> Variant:
    """Memory for a sequence's whole life at once, as Orca took it by the PagedAttention paper's account."""
    return Variant(
        f"reserved, {reservation}",
        {"kv": "reserved", "reservation": reservation, "page_size": page_size, "kv_layout": "sliced"},
        paper,
    )


MAX = reserved("max", "Orca (Max)")
POW2 = reserved("pow2", "Orca (Pow2)")
ORACLE = reserved("oracle", "Orca (Oracle)")
MAX_HOST, POW2_HOST, ORACLE_HOST = (
    replace(variant, options={**variant.options, "page_size": "4KiB", "kv_layout": "per-layer"})
    for variant in (MAX, POW2, ORACLE)
)
"""For the longest sequence there can be, for the next power of two, and for the length it will really have."""

ON_THE_PAPERS_GPU = (GPU, GPU_PER_LAYER, PAGED, ORACLE, POW2, MAX)
ON_A_GPU = (GPU, PAGED, ORACLE, MAX)
ON_A_HOST = (HOST, PAGED_HOST, ORACLE_HOST, POW2_HOST, MAX_HOST)
"""What a device's pages allow."""

SHARING_ON_A_GPU = (GPU, PAGED)
SHARING_ON_A_HOST = (HOST, PAGED_HOST)
"""Those that can share memory between sequences."""

LIVE = (HOST, PAGED_HOST, ORACLE_HOST, MAX_HOST)
"""On the CPU of this machine."""
