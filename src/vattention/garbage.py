"""The search for reference cycles, off while so much is made at once that it would go through it over and over."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collections() -> Iterator[None]:
    """After a full search, nothing is searched for cycles inside the block; what it leaves counts as old.

    The libraries' modules and a large vocabulary are some million objects, and while they come a full search starts
    with each quarter more. A model's modules refer to each other: without the first search the weights of a former
    one would stay while another is loaded.
    """
    if not gc.isenabled():
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() == 0:
            # By way of the permanent generation, all go to the oldest one unsearched.
            gc.freeze()
            gc.unfreeze()
        gc.enable()


@contextmanager
def staying() -> Iterator[None]:
    """As `no_collections`, and what there is afterwards is never searched: for a process whose only work it is."""
    with no_collections():
        yield
        gc.freeze()
