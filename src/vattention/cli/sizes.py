"""Sizes as people read them."""

from __future__ import annotations


def size(nbytes: int) -> str:
    """Bytes in the largest unit that leaves a number of at least one."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= factor:
            return f"{nbytes / factor:,.4g} {unit}"
    return f"{nbytes} bytes"
