"""A KV cache from options: the driver, the layout and the manager that fit a model and a device; its swap space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from vattention.config import EngineConfig, parse_nbytes, parse_swap_space
from vattention.core import AttentionSpec
from vattention.errors import ConfigError
from vattention.kv.block_memory import plan_blocks
from vattention.kv.layout import MAX_TOKENS, Layout, plan
from vattention.kv.manager import KVManager
from vattention.kv.paged import PagedManager
from vattention.kv.reserved import ReservedManager
from vattention.kv.swap import SwapSpace, file_space, memory_space
from vattention.kv.virtual import VirtualManager
from vattention.memory import open_driver
from vattention.memory.driver import Driver

_ROWS_PER_SEQUENCE = 2
_MIN_ROWS = 512
_MAX_RESERVED_NBYTES = 2**44
"""Of the 2**47 bytes of addresses that a process has on most machines."""


def create_manager(
    config: EngineConfig, specs: Sequence[AttentionSpec], *, dtype: torch.dtype, device: str, max_len: int
) -> KVManager:
    """Reserve the cache that `config` asks for, for layers that store keys and values as `specs` say.

    Raises:
        ConfigError: a size cannot work, or this system offers no such memory.
        OutOfMemoryError: not even the addresses can be had.
    """
    driver = open_driver(device, parse_nbytes(config.page_size) if config.page_size is not None else None)
    try:
        return _MANAGERS[config.kv](driver, config, specs, dtype, max_len)
    except BaseException:
        driver.close()
        raise


def _virtual(
    driver: Driver, config: EngineConfig, specs: Sequence[AttentionSpec], dtype: torch.dtype, max_len: int
) -> KVManager:
    place = _rows(driver, config, specs, dtype, max_len)
    layout = place(num_slots=config.max_num_seqs)
    if config.caches_prefixes:
        layout = place(num_slots=_num_rows(layout))
    return VirtualManager(
        driver,
        layout,
        dtype=dtype,
        limit_nbytes=_limit(config),
        num_slots=config.max_num_seqs,
        prefix_cache=config.caches_prefixes,
    )


def _reserved(
    driver: Driver, config: EngineConfig, specs: Sequence[AttentionSpec], dtype: torch.dtype, max_len: int
) -> KVManager:
    layout = _rows(driver, config, specs, dtype, max_len)(num_slots=config.max_num_seqs)
    return ReservedManager(driver, layout, dtype=dtype, limit_nbytes=_limit(config), reservation=config.reservation)


def _rows(
    driver: Driver, config: EngineConfig, specs: Sequence[AttentionSpec], dtype: torch.dtype, max_len: int
) -> Callable[..., Layout]:
    """Lays out a cache of contiguous rows, given their number as `num_slots`."""
    return partial(
        plan,
        specs,
        item_nbytes=dtype.itemsize,
        max_len=max_len,
        page_nbytes=driver.page_nbytes,
        sliced=config.kv_layout == "sliced",
    )


def _num_rows(layout: Layout) -> int:
    """How many rows a cache gets that would do with this layout, were it not for the prefixes that rows hold."""
    wanted = max(_ROWS_PER_SEQUENCE * layout.num_slots, _MIN_ROWS)
    by_addresses = _MAX_RESERVED_NBYTES // (layout.nbytes // layout.num_slots)
    by_tokens = (MAX_TOKENS - 1) // layout.max_len
    return max(min(wanted, by_addresses, by_tokens), layout.num_slots)


def _paged(
    driver: Driver, config: EngineConfig, specs: Sequence[AttentionSpec], dtype: torch.dtype, max_len: int
) -> KVManager:
    layout = plan_blocks(
        specs,
        driver,
        item_nbytes=dtype.itemsize,
        block_size=config.block_size,
        sliced=config.kv_layout == "sliced",
    )
    return PagedManager(
        driver,
        layout,
        num_slots=config.max_num_seqs,
        max_len=max_len,
        block_size=config.block_size,
        dtype=dtype,
        limit_nbytes=_limit(config),
        prefix_caching=config.caches_prefixes,
    )


def _limit(config: EngineConfig) -> int | None:
    return parse_nbytes(config.kv_memory) if config.kv_memory is not None else None


_Constructor = Callable[[Driver, EngineConfig, Sequence[AttentionSpec], torch.dtype, int], KVManager]

_MANAGERS: dict[str, _Constructor] = {"virtual": _virtual, "paged": _paged, "reserved": _reserved}
"""By `EngineConfig.kv`."""


def check_page_size(config: EngineConfig, device: str) -> None:
    """Find out without a model whether there are such pages; on a GPU that waits for torch to have taken it.

    Raises:
        ConfigError: there are none.
    """
    if torch.device(device).type == "cpu" and config.page_size is not None:
        open_driver(device, parse_nbytes(config.page_size)).close()


def create_swap_space(config: EngineConfig, device: str) -> SwapSpace | None:
    """Where preempted sequences are kept, as `config` asks; None where it does not.

    Raises:
        ConfigError: the folder cannot be written, or the memory is the cache's own.
    """
    if config.swap_space is None:
        return None
    target = parse_swap_space(config.swap_space)
    if target.folder is not None:
        return file_space(target.folder, target.nbytes)
    assert target.nbytes is not None
    if torch.device(device).type == "cpu" and config.kv_memory is None:
        # Each image would lower the cache's limit by as much as it freed, and preempt the next sequence.
        raise ConfigError(
            f"swap_space={config.swap_space!r} is memory of this machine, which the KV cache uses already where it "
            "may take all there is to spare; limit it with kv_memory, or give swap_space a folder"
        )
    return memory_space(target.nbytes, device)
