"""Managers under test, and how to look into what they hold."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial

import torch

from vattention.core import AttentionSpec
from vattention.kv.block_memory import plan_blocks
from vattention.kv.layout import Layout, plan
from vattention.kv.manager import CacheView, KVManager, LayerView
from vattention.kv.paged import PagedManager
from vattention.kv.reserved import ReservedManager
from vattention.kv.virtual import VirtualManager
from vattention.memory import open_driver
from vattention.memory.driver import Driver

PAGE = 4096
WINDOW = 6
NUM_SLOTS = 4
MAX_LEN = 64
SPECS = [
    AttentionSpec(2, 1, 256, 256, 1.0),  # 1 KiB per token and plane in float32: 4 tokens a page
    AttentionSpec(2, 1, 256, 256, 1.0, window=WINDOW),
    AttentionSpec(2, 1, 256, 128, 1.0),
]


def paged(
    driver: Driver | None = None,
    *,
    sliced: bool = False,
    limit_nbytes: int | None = 200 * PAGE,
    block_size: int = 4,
    caching: bool = False,
    specs: Sequence[AttentionSpec] = SPECS,
    num_slots: int = NUM_SLOTS,
) -> PagedManager:
    driver = driver or open_driver("cpu", PAGE)
    return PagedManager(
        driver,
        plan_blocks(specs, driver, item_nbytes=4, block_size=block_size, sliced=sliced),
        num_slots=num_slots,
        max_len=MAX_LEN,
        block_size=block_size,
        dtype=torch.float32,
        limit_nbytes=limit_nbytes,
        prefix_caching=caching,
    )


def rowwise(driver: Driver, sliced: bool, num_rows: int = NUM_SLOTS) -> Layout:
    """Contiguous rows for `SPECS`."""
    return plan(
        SPECS, item_nbytes=4, num_slots=num_rows, max_len=MAX_LEN, page_nbytes=driver.page_nbytes, sliced=sliced
    )


def virtual(driver: Driver, sliced: bool, limit_nbytes: int, *, caching: bool = False) -> KVManager:
    return VirtualManager(
        driver,
        rowwise(driver, sliced, 2 * NUM_SLOTS if caching else NUM_SLOTS),
        dtype=torch.float32,
        limit_nbytes=limit_nbytes,
        num_slots=NUM_SLOTS,
        prefix_cache=caching,
        background=False,
    )


def reserved(
    driver: Driver | None = None,
    sliced: bool = False,
    limit_nbytes: int | None = 200 * PAGE,
    *,
    reservation: str = "max",
) -> ReservedManager:
    driver = driver or open_driver("cpu", PAGE)
    return ReservedManager(
        driver,
        rowwise(driver, sliced),
        dtype=torch.float32,
        limit_nbytes=limit_nbytes,
        reservation=reservation,
    )


MANAGERS: dict[str, Callable[[Driver, bool, int], KVManager]] = {
    "virtual": virtual,
    "virtual-cache": partial(virtual, caching=True),
    "paged": lambda driver, sliced, limit: paged(driver, sliced=sliced, limit_nbytes=limit),
    "paged-cache": lambda driver, sliced, limit: paged(driver, sliced=sliced, limit_nbytes=limit, caching=True),
    "reserved-max": reserved,
    "reserved-pow2": partial(reserved, reservation="pow2"),
    "reserved-oracle": partial(reserved, reservation="oracle"),
}
"""Every manager there is, from a driver, whether its layout is sliced, and a limit."""


def meaning(token_ids: Sequence[int], salt: str = "") -> list[float]:
    """A number per token that depends on all tokens before it, as keys and values do."""
    numbers = []
    state = zlib.crc32(salt.encode())
    for token in token_ids:
        state = zlib.crc32(bytes([token % 256]), state)
        numbers.append(float(state % 2**20))
    return numbers


def write(
    cache: KVManager, slot: int, start: int, numbers: Sequence[float], specs: Sequence[AttentionSpec] = SPECS
) -> None:
    """Store a number per token from `start` on, as a forward stores keys and values."""
    positions = torch.arange(start, start + len(numbers))
    slots = torch.full_like(positions, slot)
    for layer, spec in enumerate(specs):
        values = torch.tensor(numbers)[:, None, None] + layer / 8
        cache.layer(layer).append(
            values.expand(-1, 1, spec.key_dim), -values.expand(-1, 1, spec.value_dim), slots, positions
        )


def rows(view: CacheView, slot: int, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [last - first, heads, dim] of a slot's tokens."""
    if isinstance(view, LayerView):
        return view.keys[slot, first:last], view.values[slot, first:last]
    positions = torch.arange(first, last)
    blocks, offsets = view.tables[slot, positions // view.block_size].long(), positions % view.block_size
    return view.keys[blocks, offsets], view.values[blocks, offsets]


def check(cache: KVManager, slot: int, numbers: Sequence[float], specs: Sequence[AttentionSpec] = SPECS) -> None:
    """The slot holds all that the token behind `numbers` reads."""
    for layer, spec in enumerate(specs):
        first = 0 if spec.window is None else max(0, len(numbers) - spec.window + 1)
        keys, values = rows(cache.layer(layer), slot, first, len(numbers))
        expected = torch.tensor(numbers[first:]) + layer / 8
        got = torch.stack((keys[:, 0, 0], keys[:, 0, -1], -values[:, 0, 0], -values[:, 0, -1]))
        assert torch.equal(got, expected.expand(4, -1)), (layer, first)


def grow(
    cache: KVManager,
    slot: int,
    token_ids: Sequence[int],
    start: int,
    *,
    salt: str = "",
    specs: Sequence[AttentionSpec] = SPECS,
) -> None:
    """What a forward does to the tokens from `start` on."""
    cache.ensure(slot, start, len(token_ids))
    write(cache, slot, start, meaning(token_ids, salt)[start:], specs)
