"""Kernels between guard pages: a byte read before the first or after the last token ends the process."""

from __future__ import annotations

import ctypes
import mmap
import signal
import subprocess
import sys
from itertools import product

import pytest
import torch

from tests.attention.subjects import SUBJECTS
from vattention.attention.kernel import RaggedBatch
from vattention.attention.registry import KERNELS
from vattention.core import AttentionSpec, Chunk
from vattention.kv.manager import CacheView, LayerView, PagedLayerView

PAGE = mmap.PAGESIZE
PROT_NONE = 0
NUM_KV_HEADS, DIM = 2, 32


def guarded(num_tokens: int, dtype: torch.dtype, first: int, last: int) -> torch.Tensor:
    """[1, num_tokens, heads, dim], readable at tokens [first, last) only, with both ends at a page's edge."""
    token_nbytes = NUM_KV_HEADS * DIM * dtype.itemsize
    assert first * token_nbytes % PAGE == last * token_nbytes % PAGE == 0
    nbytes = num_tokens * token_nbytes + PAGE
    memory = mmap.mmap(-1, nbytes)
    whole = torch.frombuffer(memory, dtype=dtype)
    tensor = whole[: num_tokens * NUM_KV_HEADS * DIM].view(1, num_tokens, NUM_KV_HEADS, DIM)
    tensor[:, first:last] = torch.randn(last - first, NUM_KV_HEADS, DIM).to(dtype)
    libc = ctypes.CDLL(None, use_errno=True)
    for start, end in ((0, first * token_nbytes), (last * token_nbytes, nbytes)):
        if end > start and libc.mprotect(ctypes.c_void_p(whole.data_ptr() + start), end - start, PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    return tensor


def run(kernel: str, itemsize: int, num_rows: int, window: int | None, beyond: int) -> None:
    """Attend over tokens up to the edge; `beyond` more tokens are promised than there are."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    per_page = PAGE // (NUM_KV_HEADS * DIM * itemsize)
    first, last = (0, 4 * per_page) if window is None else (per_page, 4 * per_page)
    start = last - num_rows
    dense = LayerView(*(guarded(5 * per_page, dtype, first, last) for _ in "kv"))
    view: CacheView = dense
    if KERNELS[kernel].reads is PagedLayerView:
        # Blocks that end where memory does; copying takes whole blocks, so for it they are pages.
        size = per_page // 4
        tables = torch.arange(5 * per_page // size, dtype=torch.int32).unsqueeze(0)
        keys, values = (x.view(-1, size, NUM_KV_HEADS, DIM) for x in (dense.keys, dense.values))
        view = PagedLayerView(keys, values, tables)
    spec = AttentionSpec(4, NUM_KV_HEADS, DIM, DIM, 0.2, window=None if window is None else start - first + 1)
    batch = RaggedBatch.of([Chunk(0, start + beyond, [0] * num_rows, 0)])
    result = KERNELS[kernel](torch.randn(num_rows, 4, DIM).to(dtype), view, batch, spec, None)
    assert result.isfinite().all()


def run_all(kernel: str) -> None:
    for itemsize, num_rows, window in product((2, 4), (1, 13), (None, 1)):
        print(f"{itemsize=} {num_rows=} {window=}", flush=True)
        run(kernel, itemsize, num_rows, window, beyond=0)


def in_a_process(call: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"from {__name__} import run, run_all; {call}"]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name in SUBJECTS])
def test_reads_nothing_outside(kernel: str) -> None:
    result = in_a_process(f"run_all({kernel!r})")
    assert result.returncode == 0, f"{result.stdout}{result.stderr}"
    assert len(result.stdout.splitlines()) == 8


def test_the_guard_page_guards() -> None:
    assert in_a_process("run('eager', 4, 1, None, beyond=1)").returncode == -signal.SIGSEGV
