"""Keys and values that tell which tokens they belong to."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

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
