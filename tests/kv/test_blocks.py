"""Block numbers, their references and the prefix cache over them."""

from __future__ import annotations

import pytest

from vattention.kv.blocks import BlockPool, block_keys, salted


def pool(count: int = 6, limit: int = 100) -> BlockPool:
    made = BlockPool(limit)
    made.supply(made.bare(count))
    return made


def test_keys_depend_on_every_token_before_and_on_the_salt() -> None:
    root = salted("")
    keys = block_keys(root, [1, 2, 3, 4, 5], 2)
    assert len(keys) == 2
    assert block_keys(root, [1, 2, 3, 4], 2) == keys
    assert block_keys(keys[0], [3, 4], 2) == keys[1:]
    assert block_keys(root, [9, 2, 3, 4], 2)[1] != keys[1]
    assert block_keys(salted("a"), [1, 2], 2)[0] != keys[0]
    assert block_keys(root, [3, 4], 2)[0] != keys[1]


def test_the_lowest_numbers_come_first() -> None:
    blocks = pool()
    assert blocks.claim(2) == [0, 1]
    assert blocks.claim(3) == [2, 3, 4]
    assert (blocks.num_free, blocks.num_live, blocks.num_references) == (1, 5, 5)
    with pytest.raises(ValueError, match="2 blocks wanted, 1 are free"):
        blocks.claim(2)


def test_a_block_is_free_when_its_last_holder_drops_it() -> None:
    blocks = pool()
    claimed = blocks.claim(2)
    blocks.share(claimed)
    assert (blocks.num_live, blocks.num_references) == (2, 4)
    blocks.drop(claimed)
    assert (blocks.num_live, blocks.num_references, blocks.num_free) == (2, 2, 4)
    blocks.drop(claimed)
    assert (blocks.num_live, blocks.num_references, blocks.num_free) == (0, 0, 6)
    with pytest.raises(ValueError, match="dropped more often"):
        blocks.drop([0])
    assert blocks.num_references == 0


def test_idle_blocks_are_evicted_least_recently_used_first_and_tail_first() -> None:
    blocks = pool()
    old, new = blocks.claim(2), blocks.claim(2)
    for block in (*old, *new):
        blocks.register(block, bytes([block]))
    blocks.drop(old)
    blocks.drop(new)
    blocks.share([old[0]])
    blocks.drop([old[0]])
    order = []
    while blocks.num_idle:
        blocks.evict(1)
        order += [b for b in (*old, *new) if blocks.find(bytes([b])) is None and b not in order]
    assert order == [old[1], new[1], new[0], old[0]]
    assert blocks.num_free == 6


def test_the_cache_keeps_the_first_of_equal_blocks() -> None:
    blocks = pool()
    first, second = blocks.claim(2)
    blocks.register(first, b"same")
    blocks.register(second, b"same")
    assert blocks.find(b"same") == first
    blocks.drop([second])
    assert (blocks.num_idle, blocks.num_free) == (0, 5)
    blocks.forget(first)
    blocks.forget(second)
    assert blocks.find(b"same") is None
    blocks.drop([first])
    assert (blocks.num_idle, blocks.num_free) == (0, 6)


def test_stripped_blocks_are_bare_and_get_memory_again() -> None:
    blocks = pool(6)
    blocks.claim(1)
    gone = blocks.last_free(2)
    assert gone.tolist() == [4, 5]
    blocks.strip(gone)
    assert blocks.with_memory().tolist() == [1, 1, 1, 1, 0, 0]
    assert blocks.num_free == 3
    assert blocks.bare(3) == [4, 5, 6]
    blocks.supply(blocks.bare(1))
    assert blocks.bare(2) == [5, 6]
    assert blocks.claim(4) == [4, 1, 2, 3]


def test_numbers_run_out() -> None:
    blocks = pool(3, limit=4)
    assert blocks.bare(5) == [3]


def test_many_blocks_grow_the_table() -> None:
    blocks = pool(5000, limit=5000)
    claimed = blocks.claim(5000)
    assert blocks.references(claimed).tolist() == [1] * 5000
