"""Keys and values that tell which tokens they belong to."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch

from vattention.core import AttentionSpec
from vattention.kv.layout import plan
from vattention.kv.virtual import VirtualManager
from vattention.memory.driver import Driver
from vattention.memory.host import HostDriver

PAGE = 4096
WINDOW = 6
MAX_LEN = 96
SPECS = [
    AttentionSpec(2, 1, 256, 256, 1.0),  # 1 KiB per token and plane in float32: 4 tokens a page
    AttentionSpec(2, 1, 256, 256, 1.0, window=WINDOW),
    AttentionSpec(2, 1, 256, 128, 1.0),
]
FULL = [SPECS[0], SPECS[2]]
PROMPT = list(range(100, 141))  # 41 tokens: 10 pages and a quarter


def sharing_manager(
    driver: Driver | None = None,
    *,
    specs: Sequence[AttentionSpec] = SPECS,
    sliced: bool = False,
    num_slots: int = 4,
    num_rows: int = 8,
    limit_pages: int = 10_000,
    prefix_cache: bool = True,
    background: bool = False,
) -> VirtualManager:
    driver = HostDriver(PAGE) if driver is None else driver
    layout = plan(
        specs, item_nbytes=4, num_slots=num_rows, max_len=MAX_LEN, page_nbytes=driver.page_nbytes, sliced=sliced
    )
    return VirtualManager(
        driver,
        layout,
        dtype=torch.float32,
        limit_nbytes=limit_pages * driver.page_nbytes,
        num_slots=num_slots,
        prefix_cache=prefix_cache,
        background=background,
    )


def stamps(tokens: Sequence[int], salt: str = "") -> torch.Tensor:
    """A number for each token that depends on it and all before, [n] of float32 without rounding."""
    values, checksum = [], zlib.crc32(salt.encode())
    for token in tokens:
        checksum = zlib.crc32(token.to_bytes(4, "little"), checksum)
        values.append(float(checksum % 2**20 + 1))
    return torch.tensor(values)


def write(
    cache: VirtualManager,
    slot: int,
    tokens: Sequence[int],
    start: int,
    salt: str = "",
    specs: Sequence[AttentionSpec] = SPECS,
    only: int | None = None,
) -> None:
    """What a forward over tokens[start:] writes, in all layers or one."""
    where = torch.full((len(tokens) - start,), slot), torch.arange(start, len(tokens))
    for layer, spec in enumerate(specs):
        if only not in (None, layer):
            continue
        values = stamps(tokens, salt)[start:, None, None] + layer / 8
        cache.layer(layer).append(values.expand(-1, 1, spec.key_dim), -values.expand(-1, 1, spec.value_dim), *where)


def compute(
    cache: VirtualManager,
    slot: int,
    tokens: Sequence[int],
    start: int,
    salt: str = "",
    specs: Sequence[AttentionSpec] = SPECS,
) -> None:
    """A forward over tokens[start:]."""
    cache.ensure(slot, start, len(tokens))
    write(cache, slot, tokens, start, salt, specs)
    cache.computed(slot, len(tokens))


def check(
    cache: VirtualManager,
    slot: int,
    tokens: Sequence[int],
    salt: str = "",
    specs: Sequence[AttentionSpec] = SPECS,
) -> None:
    """The slot holds all that the token behind `tokens` reads."""
    expected = stamps(tokens, salt)
    for layer, spec in enumerate(specs):
        first = 0 if spec.window is None else max(0, len(tokens) - spec.window + 1)
        view = cache.layer(layer)
        for values, sign in ((view.keys, 1), (view.values, -1)):
            for dim in (0, -1):
                assert torch.equal(
                    values[slot, first : len(tokens), 0, dim] * sign, expected[first:] + layer / 8
                ), f"layer {layer} of slot {slot}"


def finished(cache: VirtualManager, tokens: list[int], salt: str = "") -> int:
    """A sequence of these tokens that came and went."""
    placement = cache.take(tokens, salt=salt)
    compute(cache, placement.slot, tokens, placement.num_cached_tokens, salt)
    cache.release(placement.slot, tokens)
    return placement.slot


def holds(cache: VirtualManager, slot: int, tokens: list[int], salt: str = "") -> None:
    if cache.layer(0).keys.device.type != "meta":
        check(cache, slot, tokens, salt)


def recount(cache: VirtualManager) -> None:
    """What the cache says about its memory is what one finds by looking at every page."""
    region, pool, groups = cache._backing.region, cache._pool, cache._layout.groups
    size = region.page_nbytes
    table = region.pages(np.arange(region.num_pages))
    used, references = np.unique(table[table != 0], return_counts=True)
    assert (pool.references(used) == references).all()
    parts = [np.empty(0, np.int64)]
    num_tokens_nbytes = 0
    for slot in cache._table.slots:
        for group, extent in zip(groups, slot.extents, strict=True):
            row = region.pages(group.pages(slot.index, 0, cache.max_len))
            there = region.pages(group.pages(slot.index, extent.first, extent.last))
            assert (there != 0).all()
            assert np.count_nonzero(row) == len(there)
            if slot.live and slot.num_tokens > (first := group.first_needed(slot.start)):
                parts.append(region.pages(group.pages(slot.index, first, slot.num_tokens)))
                later = group.first_needed(max(slot.start, slot.num_tokens - 1))
                num_tokens_nbytes += (slot.num_tokens - later) * group.token_nbytes
    needed = np.concatenate(parts)
    distinct = len(np.unique(needed))
    accounts = cache.accounts()
    assert accounts.mapped_nbytes == len(used) * size + pool.idle_nbytes
    assert accounts.live_nbytes == distinct * size
    assert accounts.shared_nbytes == (len(needed) - distinct) * size
    assert accounts.token_nbytes == num_tokens_nbytes
    assert accounts.warm_nbytes == accounts.mapped_nbytes - accounts.live_nbytes
    assert accounts.mapped_nbytes <= accounts.limit_nbytes + cache.excess_nbytes
