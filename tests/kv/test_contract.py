"""What every memory manager promises the engine, in each layout, over memory and over bookkeeping."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from tests.kv.managers import MANAGERS, MAX_LEN, NUM_SLOTS, PAGE, SPECS, WINDOW, check, grow, meaning
from vattention.errors import OutOfMemoryError
from vattention.kv.manager import KVManager
from vattention.memory import open_driver

LIMIT = 400 * PAGE
"""Four sequences of `MAX_LEN` tokens and more."""

PLACES = {"host": ("cpu", False), "host-sliced": ("cpu", True), "null": ("meta", False)}

Open = Callable[[str], KVManager]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Open managers on the host by name; all are closed in the end."""
    made: list[KVManager] = []

    def open_one(name: str) -> KVManager:
        made.append(MANAGERS[name](open_driver("cpu", PAGE), False, LIMIT))
        return made[-1]

    yield open_one
    for manager in made:
        manager.close()


@pytest.fixture(params=[(name, place) for name in MANAGERS for place in PLACES], ids="-".join)
def cache(request: pytest.FixtureRequest) -> Iterator[KVManager]:
    name, place = request.param
    device, sliced = PLACES[place]
    made = MANAGERS[name](open_driver(device, PAGE), sliced, LIMIT)
    yield made
    made.close()


def check_accounts(cache: KVManager) -> None:
    accounts = cache.accounts()
    assert accounts.live_nbytes + accounts.warm_nbytes == accounts.mapped_nbytes <= accounts.reserved_nbytes
    assert min(accounts.live_nbytes, accounts.warm_nbytes, accounts.shared_nbytes) >= 0
    assert accounts.mapped_nbytes <= accounts.limit_nbytes + cache.excess_nbytes
    assert accounts.token_nbytes <= accounts.live_nbytes + accounts.shared_nbytes


@pytest.mark.parametrize("sliced", [False, True], ids=["per-layer", "sliced"])
@pytest.mark.parametrize("name", MANAGERS)
def test_contents_stay_while_sequences_come_grow_and_go(name: str, sliced: bool) -> None:
    cache = MANAGERS[name](open_driver("cpu", PAGE), sliced, LIMIT)
    running: dict[int, list[int]] = {}
    for turn in range(60):
        if cache.num_free_slots:
            prompt = [turn + i for i in range(1 + turn % 7)]
            placement = cache.take(prompt, max_tokens=MAX_LEN - 20)
            assert placement.num_cached_tokens == 0
            running[placement.slot] = prompt
            grow(cache, placement.slot, prompt, 0)
            cache.computed(placement.slot, len(prompt))
        for slot, tokens in running.items():
            start = len(tokens)
            tokens.extend([turn] * (1 + (turn + slot) % 3))
            grow(cache, slot, tokens, start)
        for slot, tokens in list(running.items()):
            check(cache, slot, meaning(tokens))
            if len(tokens) > MAX_LEN - 23:
                cache.release(slot, tokens if turn % 2 else None)
                del running[slot]
        check_accounts(cache)
    cache.close()


def test_every_slot_can_be_taken_once(cache: KVManager) -> None:
    assert cache.max_len >= MAX_LEN
    assert cache.num_slots == cache.num_free_slots == NUM_SLOTS
    slots = [cache.take([1, 2], max_tokens=8).slot for _ in range(NUM_SLOTS)]
    assert len(set(slots)) == NUM_SLOTS
    assert cache.num_free_slots == 0
    assert not cache.has_room(1)
    with pytest.raises(OutOfMemoryError):
        cache.take([1, 2], max_tokens=8)
    cache.release(slots[1])
    assert cache.num_free_slots == 1
    cache.take([1, 2], max_tokens=8)


def test_released_memory_is_warm_until_it_is_dropped(cache: KVManager) -> None:
    slot = cache.take(list(range(20)), max_tokens=30).slot
    cache.ensure(slot, 0, 20)
    cache.computed(slot, 20)
    check_accounts(cache)
    accounts = cache.accounts()
    assert accounts.token_nbytes == sum(
        (20 if spec.window is None else WINDOW) * 4 * (spec.key_dim + spec.value_dim) for spec in SPECS
    )
    cache.release(slot)
    check_accounts(cache)
    after = cache.accounts()
    assert after.mapped_nbytes == after.warm_nbytes == accounts.mapped_nbytes
    assert after.live_nbytes == after.token_nbytes == 0
    cache.drop_warm()
    assert cache.accounts().mapped_nbytes == 0


def test_shortage_changes_nothing(cache: KVManager) -> None:
    """A sequence runs, a second does not fit beside it, and does when the first has gone."""
    slot = cache.take([1], max_tokens=40).slot
    cache.ensure(slot, 0, 32)
    cache.drop_warm()
    cache.set_limit(cache.accounts().mapped_nbytes + 2 * PAGE)
    before = cache.accounts()
    with pytest.raises(OutOfMemoryError, match="kv_memory"):
        begin(cache)
    assert cache.num_free_slots == NUM_SLOTS - 1
    assert cache.accounts().live_nbytes == before.live_nbytes
    assert not cache.has_room(32)
    cache.release(slot)
    assert cache.has_room(32)
    begin(cache)
    check_accounts(cache)


@pytest.mark.parametrize("name", [name for name in MANAGERS if not name.startswith("reserved")])
def test_room_is_told_to_the_page(name: str, opened: Open) -> None:
    cache = opened(name)
    length = 29  # where a block begins, and the window holds most
    for token_ids in ([1], [2]):
        limit = cache.accounts().live_nbytes
        cache.set_limit(limit)
        while not cache.has_room(length, token_ids):
            limit += PAGE
            cache.set_limit(limit)
        slot = cache.take(token_ids).slot
        for start in range(length):
            cache.ensure(slot, start, start + 1)
        assert cache.accounts().live_nbytes == limit


def test_room_is_needed_for_what_is_not_shared() -> None:
    """By every manager with a prefix cache, and by no other."""
    tokens, other = list(range(32)), list(range(50, 82))
    for name, make in MANAGERS.items():
        with closing(make(open_driver("cpu", PAGE), False, LIMIT)) as cache:
            slot = cache.take(tokens, max_tokens=40).slot
            cache.ensure(slot, 0, 32)
            cache.computed(slot, 32)
            cache.drop_warm()
            cache.set_limit(cache.accounts().mapped_nbytes + 8 * PAGE)
            shares = name.endswith("cache")
            assert cache.has_room(33, [*tokens, 1]) == shares
            assert not cache.has_room(33, [*tokens, 1], salt="another")
            assert not cache.has_room(33, [*other, 1])
            assert not cache.has_room(64, [*tokens, *other])
            if shares:
                placement = cache.take([*tokens, 1])
                assert placement.num_cached_tokens == 32
                cache.ensure(placement.slot, 32, 33)


def begin(cache: KVManager) -> int:
    """A sequence of 32 tokens at once; where there is no memory for it, it goes as it came."""
    slot = cache.take([2], max_tokens=40).slot
    try:
        cache.ensure(slot, 0, 32)
    except OutOfMemoryError:
        cache.release(slot)
        raise
    return slot


def test_what_fits_alone_can_be_computed(cache: KVManager) -> None:
    for pages in (20, 50, 80, 120):
        cache.set_limit(pages * PAGE)
        for length in range(1, MAX_LEN + 1, 9):
            if cache.fits(length):
                assert cache.has_room(length)
                slot = cache.take([0] * length, max_tokens=length).slot
                for start in range(length):
                    cache.ensure(slot, start, start + 1)
                cache.release(slot)
    assert cache.fits(MAX_LEN)
    assert not cache.fits(cache.max_len + 1)


def test_a_fallen_limit_is_exceeded_until_somebody_goes(cache: KVManager) -> None:
    slots = [cache.take([i], max_tokens=32).slot for i in range(2)]
    for slot in slots:
        cache.ensure(slot, 0, 32)
    cache.drop_warm()
    mapped = cache.accounts().mapped_nbytes
    cache.set_limit(mapped - 3 * PAGE)
    assert cache.excess_nbytes == 3 * PAGE
    cache.release(slots[0])
    assert cache.excess_nbytes == 0
    check_accounts(cache)
    cache.set_limit(2 * mapped)
    assert cache.accounts().limit_nbytes == 2 * mapped
    cache.refresh_limit()
    assert cache.accounts().limit_nbytes == 2 * mapped


@pytest.mark.parametrize("name", MANAGERS)
def test_tokens_can_be_forgotten_and_written_again(name: str, opened: Open) -> None:
    cache = opened(name)
    tokens = list(range(9))
    slot = cache.take(tokens, max_tokens=20).slot
    grow(cache, slot, tokens, 0)
    cache.computed(slot, 9)
    for length in (8, 3, 1):
        cache.trim(slot, length)
        with pytest.raises(ValueError, match=f"{length} tokens"):
            cache.fork(slot, length + 1)
        tokens = [*tokens[:length], *range(100 + length, 111)]
        grow(cache, slot, tokens, length)
        check(cache, slot, meaning(tokens))
    check_accounts(cache)


@pytest.mark.parametrize("name", MANAGERS)
def test_forks_do_not_reach_each_other(name: str, opened: Open) -> None:
    cache = opened(name)
    tokens = list(range(14))
    parent = cache.take(tokens, max_tokens=40).slot
    grow(cache, parent, tokens, 0)
    cache.computed(parent, 14)
    sequences = {parent: tokens}
    sequences[cache.fork(parent, 14)] = tokens
    sequences[cache.fork(parent, 13)] = tokens[:13]
    for last in range(8):
        for slot, held in sequences.items():
            sequences[slot] = [*held, 10 * slot + last]
            grow(cache, slot, sequences[slot], len(held))
        for slot, held in sequences.items():
            check(cache, slot, meaning(held))
        check_accounts(cache)
    cache.release(parent, sequences.pop(parent))
    for slot, held in sequences.items():
        check(cache, slot, meaning(held))
        grandchild = cache.fork(slot, len(held))
        grow(cache, grandchild, [*held, 99], len(held))
        check(cache, slot, meaning(held))
        check(cache, grandchild, meaning([*held, 99]))
        cache.release(grandchild)
    with pytest.raises(ValueError, match="belongs to no sequence"):
        cache.fork(parent, 1)


@pytest.mark.parametrize("name", MANAGERS)
def test_a_fork_needs_a_slot(name: str, opened: Open) -> None:
    cache = opened(name)
    slot = cache.take([1, 2], max_tokens=8).slot
    grow(cache, slot, [1, 2], 0)
    for _ in range(NUM_SLOTS - 1):
        cache.fork(slot, 2)
    with pytest.raises(OutOfMemoryError):
        cache.fork(slot, 2)
    check(cache, slot, meaning([1, 2]))


@pytest.mark.parametrize("name", MANAGERS)
@pytest.mark.parametrize("length", [1, 4, 13, 40])
def test_memory_can_be_copied_out_and_in(name: str, length: int, opened: Open) -> None:
    cache = opened(name)
    tokens = list(range(length))
    grown, at_once = cache.take(tokens, max_tokens=50).slot, cache.take(tokens, max_tokens=50).slot
    for start in range(0, length, 3):
        grow(cache, grown, tokens[: start + 3], start)
    image = [run.clone() for run in cache.runs(grown, length)]
    cache.ensure(at_once, length, length)
    runs = cache.runs(at_once, length)
    assert [run.shape for run in runs] == [run.shape for run in image]
    for target, source in zip(runs, image, strict=True):
        assert target.dtype is source.dtype is image[0].dtype
        target.view(-1).copy_(source.view(-1))
    cache.release(grown)
    check(cache, at_once, meaning(tokens))
    grow(cache, at_once, [*tokens, 5], length)
    check(cache, at_once, meaning([*tokens, 5]))


def test_slots_without_an_owner_are_refused(cache: KVManager) -> None:
    with pytest.raises(ValueError, match="belongs to no sequence"):
        cache.ensure(0, 0, 1)
    with pytest.raises(ValueError, match="belongs to no sequence"):
        cache.release(0)
    with pytest.raises(ValueError, match="belongs to no sequence"):
        cache.trim(0, 0)


def test_without_a_known_prefix_nobody_waits(cache: KVManager) -> None:
    assert not cache.awaits([1, 2, 3, 4, 5, 6])
    assert cache.take([1, 2, 3, 4, 5, 6], max_tokens=8).num_cached_tokens == 0


def test_layers_have_room_for_every_slot_and_token(cache: KVManager) -> None:
    for index, spec in enumerate(SPECS):
        view = cache.layer(index)
        assert view.keys.shape[2:] == (spec.num_kv_heads, spec.key_dim)
        assert view.values.shape[2:] == (spec.num_kv_heads, spec.value_dim)
        assert view.keys.shape[:2] == view.values.shape[:2]
