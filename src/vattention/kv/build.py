"""A KV cache from options: the driver, the layout and the manager that fit a model and a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vattention.config import EngineConfig, parse_nbytes
from vattention.core import AttentionSpec
from vattention.kv.layout import plan
from vattention.kv.manager import KVManager
from vattention.kv.virtual import VirtualManager
from vattention.memory import open_driver


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
        layout = plan(
            specs,
            item_nbytes=dtype.itemsize,
            num_slots=config.max_num_seqs,
            max_len=max_len,
            page_nbytes=driver.page_nbytes,
            sliced=config.kv_layout == "sliced",
        )
        limit = parse_nbytes(config.kv_memory) if config.kv_memory is not None else None
        return VirtualManager(driver, layout, dtype=dtype, limit_nbytes=limit)
    except BaseException:
        driver.close()
        raise
