"""Swapping against recomputing, and that what goes wrong with swapping only costs computing again."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from tests.attention.dense import DenseManager
from vattention.core import AttentionSpec
from vattention.engine.preemption import Rate, Swapper, SwapPolicy
from vattention.errors import DriverError, OutOfMemoryError
from vattention.kv.swap import SwappedImage, SwapSpace, file_space, memory_space

SPECS = [AttentionSpec(4, 2, 8, 16, 1.0), AttentionSpec(4, 1, 8, 8, 1.0, window=4)]


def policy(*, prefill: float, out: float, back: float) -> SwapPolicy:
    """One that has seen these rates, per second."""
    made = SwapPolicy()
    made.prefill.measured(int(prefill * 10), 10)
    made.copy_out.measured(int(out * 10), 10)
    made.copy_in.measured(int(back * 10), 10)
    return made


def filled(manager: DenseManager, num_tokens: int) -> tuple[int, list[torch.Tensor]]:
    """A slot with random tokens, and what is in its memory."""
    slot = manager.take(()).slot
    manager.ensure(slot, 0, num_tokens)
    for run in manager.runs(slot, num_tokens):
        run.copy_(torch.randint(0, 256, run.shape, dtype=torch.uint8))
    return slot, [run.clone() for run in manager.runs(slot, num_tokens)]


def test_a_rate_follows_what_is_measured_and_weighs_by_amount() -> None:
    rate = Rate()
    assert rate.seconds(100) == 0
    rate.measured(1000, 1.0)
    assert rate.seconds(500) == pytest.approx(0.5)
    rate.measured(1, 0.1)
    assert rate.seconds(500) == pytest.approx(0.5, rel=0.2)
    for _ in range(60):
        rate.measured(1000, 0.1)
    assert rate.seconds(500) == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize(
    ("nbytes", "num_tokens", "swaps"),
    [
        (1_000_000, 100, False),  # 1 s out and 2 s back, against 1 s
        (1_000_000, 290, False),
        (1_000_000, 310, True),
        (1, 1, True),
    ],
)
def test_the_cheaper_way_is_taken(nbytes: int, num_tokens: int, swaps: bool) -> None:
    assert policy(prefill=100, out=1e6, back=0.5e6).swaps(nbytes, num_tokens) == swaps


def test_the_first_sequence_is_swapped_to_learn_from_it() -> None:
    made = SwapPolicy()
    made.prefill.measured(1000, 1.0)
    assert made.swaps(1 << 30, 1)


def test_slow_copies_are_tried_again_now_and_then() -> None:
    made = policy(prefill=1e6, out=1, back=1)
    tries = [made.swaps(1000, 1) for _ in range(100)]
    assert 2 <= sum(tries) <= 10
    assert not any(tries[:10])


def test_an_image_is_worth_loading_by_what_it_saves() -> None:
    made = policy(prefill=100, out=1, back=1e6)
    assert made.loads(1_000_000, 150)
    assert not made.loads(1_000_000, 50)
    assert not SwapPolicy().loads(1, 0)


@pytest.fixture(params=["memory", "file"])
def space(request: pytest.FixtureRequest, tmp_path: Path) -> SwapSpace:
    return memory_space(1 << 20, "cpu") if request.param == "memory" else file_space(tmp_path, 1 << 20)


def test_contents_follow_a_sequence_from_slot_to_slot(space: SwapSpace) -> None:
    manager = DenseManager(SPECS, num_slots=3, max_len=16)
    swapper = Swapper(manager, space)
    slot, contents = filled(manager, 11)
    image = swapper.save(slot, 11)
    assert image is not None
    assert (swapper.num_images, swapper.used_nbytes) == (1, sum(run.nbytes for run in contents))
    manager.release(slot)
    filled(manager, 11)  # somebody else takes the slot
    other = manager.take(()).slot
    assert other != slot
    manager.ensure(other, 11, 11)
    assert swapper.load(image, other)
    image.free()
    for run, content in zip(manager.runs(other, 11), contents, strict=True):
        assert torch.equal(run, content)
    assert (swapper.num_images, swapper.used_nbytes) == (0, 0)


def test_nothing_is_kept_without_a_space_tokens_or_profit(space: SwapSpace) -> None:
    manager = DenseManager(SPECS, num_slots=1, max_len=16)
    slot, _ = filled(manager, 8)
    assert Swapper(manager, None).save(slot, 8) is None
    assert Swapper(manager, space).save(slot, 0) is None
    assert Swapper(manager, space, policy(prefill=1e9, out=1, back=1)).save(slot, 8) is None
    assert space.num_images == 0


@pytest.mark.parametrize("error", [OutOfMemoryError(9, 0, "full"), DriverError("write", 5, "broken")])
def test_a_failed_save_means_computing_again_and_costs_its_time(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, logger="vattention")
    manager = DenseManager(SPECS, num_slots=1, max_len=16)
    slot, contents = filled(manager, 8)
    space = memory_space(1 << 20, "cpu")
    learned = policy(prefill=1, out=1e6, back=1e6)
    swapper = Swapper(manager, space, learned)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(space, "save", fail)
    before = learned.copy_out.seconds(1000)
    assert swapper.save(slot, 8) is None
    assert learned.copy_out.seconds(1000) > before
    for run, content in zip(manager.runs(slot, 8), contents, strict=True):
        assert torch.equal(run, content)


def test_a_failed_load_means_computing_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, logger="vattention")
    manager = DenseManager(SPECS, num_slots=1, max_len=16)
    slot, _ = filled(manager, 8)
    space = memory_space(1 << 20, "cpu")
    swapper = Swapper(manager, space)
    image = swapper.save(slot, 8)
    assert isinstance(image, SwappedImage)

    def fail(*_: object) -> None:
        raise OSError(5, "broken")

    monkeypatch.setattr(image.storage, "read", fail)
    assert not swapper.load(image, slot)
