"""The search for reference cycles, off while so much is made at once that it would go through it over and over."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collections() -> Iterator[None]:
    """Inside the block nothing is searched for cycles; what it leaves counts as old from then on.

    The libraries' modules and a large vocabulary are some million objects, and while they come a full search starts
    with each quarter more.
    """
    if not gc.isenabled():
        yield
        return
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
def loading() -> Iterator[None]:
    """`no_collections` after a full search, so that a former model does not stay while another is loaded.

    Its modules refer to each other.
    """
    if gc.isenabled():
        gc.collect()
    with no_collections():
        yield


@contextmanager
def staying() -> Iterator[None]:
    """As `no_collections`, and what there is afterwards is never searched: for a process whose only work it is."""
    with no_collections():
        yield
        gc.freeze()
