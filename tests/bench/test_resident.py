from __future__ import annotations

import mmap

from vattention.bench.resident import peak_resident_nbytes, resident_nbytes


def test_touched_memory_is_resident_and_the_peak_remembers_it() -> None:
    size = 64 * 2**20
    before = resident_nbytes()
    with mmap.mmap(-1, size) as memory:
        for page in range(0, size, mmap.PAGESIZE):
            memory[page] = 1
        held = resident_nbytes()
    assert 0.9 * size < held - before < 1.5 * size
    assert resident_nbytes() < held - 0.9 * size
    # The kernel counts per processor and adds up now and then.
    assert peak_resident_nbytes() >= held - 2 * 2**20
