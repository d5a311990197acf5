"""Tables over very many pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vattention.memory.table import Table


def resident_nbytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def test_only_what_is_written_costs_memory() -> None:
    before = resident_nbytes()
    table = Table(2**35, np.int64)
    table.values[[5, 2**34, -1]] = 1
    assert table.values[[5, 6, 2**34, -1]].tolist() == [1, 0, 1, 1]
    assert resident_nbytes() - before < 2**20


def test_growing_keeps_the_entries() -> None:
    table = Table(3, np.int64)
    table.values[:3] = [7, 8, 9]
    for count in (1000, 2**30):
        table.grow(count)
        assert len(table.values) >= count
        assert table.values[:4].tolist() == [7, 8, 9, 0]
        assert table.values[-1] == 0
