"""Layers of `VirtualCache` against transformers' dynamic layers, under the same calls in any order."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vattention.errors import ContextLengthError, OutOfMemoryError, RequestError
from vattention.hf.growing import CacheMemory
from vattention.hf.layers import VirtualLayer, VirtualSlidingLayer

HEADS, KEY_DIM, VALUE_DIM, MAX_LENGTH, MAX_BATCH = 2, 64, 32, 300, 6


def tokens(batch: int, count: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Models hand over transposed views, not dense tensors.
    key = torch.randn(batch, count, HEADS, KEY_DIM, generator=generator).transpose(1, 2)
    value = torch.randn(batch, count, HEADS, VALUE_DIM, generator=generator).transpose(1, 2)
    return key, value


def full_layer(max_length: int = MAX_LENGTH, limit_nbytes: int = 2**26) -> VirtualLayer:
    return VirtualLayer(CacheMemory(None, limit_nbytes), max_length)


def sliding_layer(window: int, max_length: int = MAX_LENGTH) -> VirtualSlidingLayer:
    return VirtualSlidingLayer(CacheMemory(None, 2**26), max_length, window)


class AgainstDynamicLayer(RuleBasedStateMachine):
    """Every call gives the same tokens as transformers' layer, which never writes in place."""

    layer: VirtualLayer
    reference: DynamicLayer
    batch: int
    window: int | None = None
    seed = 0

    @initialize(batch=st.integers(1, 3))
    def start(self, batch: int) -> None:
        self.layer, self.reference, self.batch = full_layer(), DynamicLayer(), batch
        self.append(5)

    @property
    def length(self) -> int:
        return int(self.layer.get_seq_length())

    @rule(count=st.integers(1, 40))
    def append(self, count: int) -> None:
        if self.length + count > MAX_LENGTH:
            return
        self.seed += 1
        new = tokens(self.batch, count, seed=self.seed)
        sizes = self.layer.get_mask_sizes(count)
        assert sizes == self.reference.get_mask_sizes(count)
        kv_length, _ = sizes
        for got, expected in zip(self.layer.update(*new), self.reference.update(*new), strict=True):
            # While it records the past, transformers 5.17 returns more than it announced.
            torch.testing.assert_close(got, expected[:, :, -kv_length:], rtol=0, atol=0)

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        parents = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=self.batch, max_size=self.batch))
        self.both("reorder_cache", torch.tensor(parents))

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=MAX_BATCH))
        self.both("batch_select_indices", torch.tensor(rows))
        self.batch = len(rows)

    @rule()
    def select_by_mask(self) -> None:
        mask = torch.ones(self.batch, dtype=torch.bool)
        mask[1:] = torch.arange(1, self.batch) % 2 == 0
        self.both("batch_select_indices", mask)
        self.batch = int(mask.sum())

    @precondition(lambda self: self.batch * 2 <= MAX_BATCH)
    @rule()
    def repeat(self) -> None:
        self.both("batch_repeat_interleave", 2)
        self.batch *= 2

    @rule()
    def offload(self) -> None:
        self.layer.offload()
        assert self.layer.mapped_nbytes == 0

    @rule()
    def prefetch(self) -> None:
        self.layer.prefetch()

    @rule()
    def deepcopy(self) -> None:
        original, self.layer = self.layer, copy.deepcopy(self.layer)
        original.reset()

    @rule()
    def pickled(self) -> None:
        self.layer = pickle.loads(pickle.dumps(self.layer))

    @rule(count=st.integers(0, 30))
    def crop(self, count: int) -> None:
        self.both("crop", -min(count, self.length - 1))

    @rule(batch=st.integers(1, 3))
    def reset(self, batch: int) -> None:
        self.layer.reset()
        assert (self.layer.get_seq_length(), self.layer.mapped_nbytes, self.layer.keys) == (0, 0, None)
        self.reference, self.batch = DynamicLayer(), batch
        self.append(3)

    @invariant()
    def holds_the_same_tokens(self) -> None:
        assert self.length == self.reference.get_seq_length()
        torch.testing.assert_close(self.layer.keys, self.reference.keys, rtol=0, atol=0)
        torch.testing.assert_close(self.layer.values, self.reference.values, rtol=0, atol=0)

    def both(self, name: str, argument: Any) -> None:
        getattr(self.layer, name)(argument)
        getattr(self.reference, name)(argument)


class AgainstDynamicSlidingLayer(AgainstDynamicLayer):
    """The same for a window, rolled back only where transformers' layer can do it: while it records the past."""

    window: int

    @initialize(batch=st.integers(1, 3), window=st.integers(2, 50), record=st.booleans())
    def start_sliding(self, batch: int, window: int, record: bool) -> None:
        self.layer, self.reference = sliding_layer(window), DynamicSlidingWindowLayer(window)
        self.batch, self.window = batch, window
        if record:
            self.layer.activate_past_recording()
            self.reference.activate_past_recording()
        self.append(5)

    def start(self, batch: int) -> None:
        """Hidden: `start_sliding` is the beginning."""

    @rule(count=st.integers(0, 30))
    def crop(self, count: int) -> None:
        if self.length < self.window or self.reference.record_past:
            # What transformers keeps may not reach back far enough after crops that follow each other.
            count = min(count, self.length - 1, max(self.reference.keys.shape[-2] - self.window + 1, 0))
            self.both("crop", -count)

    def reset(self, batch: int) -> None:
        """Not here: transformers 5.17 does not empty its layer."""


TestFull = AgainstDynamicLayer.TestCase
TestFull.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestSliding = AgainstDynamicSlidingLayer.TestCase
TestSliding.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_growth_happens_in_place() -> None:
    layer = full_layer()
    first, _ = layer.update(*tokens(2, 10))
    later, _ = layer.update(*tokens(2, 200))
    assert first.data_ptr() == later.data_ptr()
    assert torch.equal(later[:, :, :10], first)


def test_memory_follows_the_tokens() -> None:
    layer = full_layer(max_length=100_000)
    layer.update(*tokens(2, 1))
    few = layer.mapped_nbytes
    token_nbytes = 2 * HEADS * (KEY_DIM + VALUE_DIM) * 4
    assert token_nbytes <= few < layer.reserved_nbytes / 1000
    layer.update(*tokens(2, 4000))
    assert 4001 * token_nbytes <= layer.mapped_nbytes <= 4001 * token_nbytes + few
    layer.crop(-3000)
    assert layer.mapped_nbytes <= 1001 * token_nbytes + 2 * few


def test_memory_behind_the_window_goes_back() -> None:
    layer = sliding_layer(window=64, max_length=100_000)
    layer.update(*tokens(1, 3000))
    prefill = layer.mapped_nbytes
    for step in range(100):
        layer.update(*tokens(1, 1, seed=step))
    assert layer.mapped_nbytes < prefill / 10
    assert layer.keys.shape[-2] == 63


def test_a_window_rolls_back_the_last_update_without_recording() -> None:
    layer, reference = sliding_layer(window=16), DynamicSlidingWindowLayer(16)
    for part in (30, 8):
        layer.update(*tokens(1, part, seed=part))
    reference.update(*tokens(1, 30, seed=30))
    layer.crop(-8)
    assert torch.equal(layer.keys, reference.keys)
    with pytest.raises(RequestError, match="activate_past_recording"):
        layer.crop(-10)


def test_too_many_tokens_say_how_many_fit() -> None:
    layer = full_layer(max_length=20)
    layer.update(*tokens(1, 18))
    with pytest.raises(ContextLengthError, match=r"room for 21 tokens.* room for 20; raise .*max_length"):
        layer.update(*tokens(1, 3))
    assert layer.get_seq_length() == 18
    layer.update(*tokens(1, 2))


def test_too_little_memory_leaves_the_layer_as_it_was() -> None:
    layer, reference = full_layer(limit_nbytes=2**16), DynamicLayer()
    keys, _ = layer.update(*tokens(1, 10))
    reference.update(*tokens(1, 10))
    with pytest.raises(OutOfMemoryError, match="limit_nbytes"):
        layer.update(*tokens(1, 200))
    assert layer.get_seq_length() == 10
    assert torch.equal(keys, reference.keys)


@pytest.mark.parametrize("batch", [1, 3])
def test_another_batch_needs_a_reset(batch: int) -> None:
    layer = full_layer()
    layer.update(*tokens(2, 4))
    with pytest.raises(RequestError, match=r"reset\(\)"):
        layer.update(*tokens(batch, 1))
    layer.reset()
    assert len(layer.update(*tokens(batch, 1))[0]) == batch


def test_a_positive_crop_is_refused() -> None:
    with pytest.raises(RequestError, match="negative"):
        full_layer().crop(3)


def test_beams_copy_only_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = full_layer()
    layer.update(*tokens(1, 100))
    layer.batch_repeat_interleave(3)
    layer.update(*tokens(3, 2))
    copied = 0
    copy_ = torch.Tensor.copy_

    def counting(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        nonlocal copied
        copied += target.shape[-2]
        return copy_(target, source)

    monkeypatch.setattr(torch.Tensor, "copy_", counting)
    layer.reorder_cache(torch.tensor([0, 0, 2]))
    assert copied == 2 * 2  # two tokens of one row, in keys and in values
    layer.reorder_cache(torch.tensor([0, 1, 2]))
    assert copied == 2 * 2


def test_beams_that_parted_after_a_crop_are_copied_from_there_on() -> None:
    layer, reference = full_layer(), DynamicLayer()
    for each in (layer, reference):
        each.update(*tokens(1, 20))
        each.batch_repeat_interleave(2)
        each.crop(-15)
        each.update(*tokens(2, 30, seed=1))
        each.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer.keys, reference.keys)


def test_tensors_from_inference_mode_grow_outside_of_it() -> None:
    layer = full_layer()
    with torch.inference_mode():
        layer.update(*tokens(1, 5))
    keys, _ = layer.update(*tokens(1, 5))
    assert keys.shape[-2] == 10


def test_states_that_want_gradients_leave_no_graph_behind() -> None:
    layer = full_layer()
    key, value = tokens(1, 5)
    keys, values = layer.update(key.requires_grad_(), value.requires_grad_())
    assert not keys.requires_grad
    assert not values.requires_grad


def test_large_pages_hold_all_heads_of_a_row() -> None:
    small = VirtualLayer(CacheMemory(None, 2**26), 4096)
    large = VirtualLayer(CacheMemory(2**17, 2**26), 4096)
    for layer in (small, large):
        layer.update(*tokens(2, 100))
        layer.reorder_cache(torch.tensor([1, 0]))
    assert large.mapped_nbytes == 2 * 2 * 2**17  # keys and values of two rows, whatever the number of heads
    assert torch.equal(small.keys, large.keys)
    assert torch.equal(small.values, large.values)
