"""Decode steps by graphs against decode steps launched one kernel after the other."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch

from tests.attention.dense import DenseManager
from tests.memory.fake_cuda import GRANULARITY, FakeCuda, FakeTorch
from tests.model.architectures import ARCHITECTURES, MAX_LEN, VOCAB_SIZE
from tests.model.fake_graphs import DeviceKernel, FakeCapture
from vattention.attention import registry
from vattention.config import EngineConfig
from vattention.core import Chunk
from vattention.errors import OutOfMemoryError
from vattention.kv.build import create_manager
from vattention.kv.layout import plan
from vattention.kv.manager import KVManager, LayerView, PagedLayerView
from vattention.kv.virtual import VirtualManager
from vattention.memory.cuda import CudaDriver
from vattention.model import decode_graphs
from vattention.model.decode_graphs import batch_sizes, key_bounds
from vattention.model.probe import probe
from vattention.model.runner import ModelRunner

PROMPTS = [list(range(3, 3 + length)) for length in (5, 20, 1, 9, 14, 2)]


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> FakeCapture:
    """Kernels that can be captured are chosen first."""
    capture = FakeCapture()
    kinds = (LayerView, PagedLayerView)
    added = {f"device {kind.__name__}": DeviceKernel(kind, capture.opaque) for kind in kinds}
    monkeypatch.setattr(registry, "KERNELS", MappingProxyType(added | dict(registry.KERNELS)))
    return capture


class Rig:
    """A model over a cache, and what its sequences hold."""

    def __init__(self, architecture: str, kv: str, num_slots: int = 7) -> None:
        self.model = ARCHITECTURES[architecture]()
        attention = probe(self.model)
        self.kv: KVManager = self._manager(kv, attention.cache_specs, num_slots)
        self.runner = ModelRunner(self.model, attention, self.kv)
        self.slots: dict[int, int] = {}
        self.texts: dict[int, list[int]] = {}

    @staticmethod
    def _manager(kv: str, specs: Any, num_slots: int) -> KVManager:
        if kv == "dense":
            return DenseManager(specs, num_slots=num_slots, max_len=MAX_LEN)
        if kv == "fake GPU":
            return _on_a_fake_gpu(specs, num_slots)
        config = EngineConfig(model="none", kv=kv, max_num_seqs=num_slots, kv_memory="64MiB", block_size=4)  # type: ignore[arg-type]
        return create_manager(config, specs, dtype=torch.float32, device="cpu", max_len=MAX_LEN)

    def begin(self, name: int) -> None:
        prompt = PROMPTS[name]
        self.slots[name] = slot = self.kv.take((), max_tokens=MAX_LEN).slot
        self.kv.ensure(slot, 0, len(prompt))
        logits = self.runner.forward([Chunk(slot, 0, prompt, 1)])
        self.texts[name] = [*prompt, int(logits[0].argmax())]

    def end(self, name: int) -> None:
        self.kv.release(self.slots.pop(name))

    def step(self, *names: int) -> torch.Tensor:
        """One token more of each."""
        chunks = []
        for name in names:
            position = len(self.texts[name]) - 1
            self.kv.ensure(self.slots[name], position, position + 1)
            chunks.append(Chunk(self.slots[name], position, self.texts[name][-1:], 1))
        logits = self.runner.forward(chunks)
        for name, row in zip(names, logits, strict=True):
            self.texts[name].append(int(row.argmax()))
        return logits

    def run(self) -> list[torch.Tensor]:
        """Sequences come and go, and grow over several pages and blocks."""
        self.begin(0)
        found = [self.step(0)]
        self.begin(1)
        self.begin(2)
        found += [self.step(0, 1, 2) for _ in range(3)]
        self.end(1)
        found += [self.step(2, 0) for _ in range(2)]
        for name in (3, 4, 5):
            self.begin(name)
        found += [self.step(5, 4, 3, 2, 0) for _ in range(20)]
        self.end(0)
        found += [self.step(2, 3, 4, 5), self.step(4)]
        return found

    def close(self) -> None:
        self.runner.close()
        self.kv.close()


def _on_a_fake_gpu(specs: Any, num_slots: int) -> KVManager:
    driver = CudaDriver(api=FakeCuda(512 * GRANULARITY), torch_side=FakeTorch())
    driver._capabilities = replace(driver.capabilities, device="cpu")
    layout = plan(
        specs, item_nbytes=4, num_slots=num_slots, max_len=MAX_LEN, page_nbytes=driver.page_nbytes, sliced=False
    )
    return VirtualManager(driver, layout, dtype=torch.float32, limit_nbytes=None)


# The fake GPU's memory cannot be touched where nothing is mapped.
CASES = [("gemma2", kv) for kv in ("dense", "virtual", "reserved", "paged")] + [
    ("llama", "virtual"),
    ("gpt2", "dense"),
    ("llama", "fake GPU"),
]


@pytest.mark.parametrize(("architecture", "kv"), CASES)
def test_replays_compute_what_launches_do(architecture: str, kv: str, graphs: FakeCapture) -> None:
    eager, rig = Rig(architecture, kv), Rig(architecture, kv)
    expected = eager.run()
    rig.runner.capture(graphs)
    found = rig.run()
    assert graphs.num_replays == len(found) + 1  # a prompt of one token
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert rig.texts == eager.texts
    eager.close()
    rig.close()


@pytest.fixture
def rig(graphs: FakeCapture) -> Iterator[Rig]:
    rig = Rig("llama", "dense")
    report = rig.runner.capture(graphs)
    assert report.num_graphs == 4
    assert report.elapsed_s > 0
    yield rig
    rig.close()


def test_rows_that_fill_up_write_to_the_scratch_slot_alone(rig: Rig) -> None:
    scratch = 6 - rig.kv.num_free_slots  # `DenseManager` gives slots in ascending order
    for name in (0, 1, 2):
        rig.begin(name)
    rig.step(0, 1, 2)  # filled up to four
    for layer in range(2):
        view = rig.kv.layer(layer)
        for slot in range(rig.kv.num_slots):
            for tensor in (view.keys, view.values):
                written = tensor[slot].isfinite().all(-1).all(-1)
                owner = next((name for name, own in rig.slots.items() if own == slot), None)
                count = 1 if slot == scratch else 0 if owner is None else len(PROMPTS[owner]) + 1
                assert written[:count].all()
                assert not written[count:].any()


def test_nothing_is_captured_twice(rig: Rig, graphs: FakeCapture) -> None:
    assert graphs.num_captures == len(batch_sizes(6)) == 4
    rig.run()
    assert graphs.num_captures == 4
    assert graphs.num_replays == 29


def test_prompts_and_large_batches_are_launched(graphs: FakeCapture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graphs, "_MOST_SEQUENCES", 2)
    rig = Rig("llama", "dense")
    rig.runner.capture(graphs)
    for name in (0, 1, 2):
        rig.begin(name)
    assert graphs.num_replays == 1  # a prompt of one token
    rig.step(0, 1, 2)
    assert graphs.num_replays == 1
    rig.step(0, 1)
    assert graphs.num_replays == 2
    rig.close()


def test_only_wanted_rows_come_back(rig: Rig, graphs: FakeCapture) -> None:
    rig.begin(0)
    rig.begin(1)
    chunks = [Chunk(rig.slots[name], len(rig.texts[name]) - 1, [7], name) for name in (0, 1)]
    replays = graphs.num_replays
    found = rig.runner.forward(chunks)
    assert found.shape == (1, VOCAB_SIZE)
    assert graphs.num_replays == replays + 1
    rig.runner.launch_eagerly()
    torch.testing.assert_close(rig.runner.forward(chunks), found, atol=1e-5, rtol=1e-5)


def test_a_capture_writes_to_no_slot_that_was_in_use_before(
    graphs: FakeCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_graphs, "_FIRST_MOST_KEYS", 8)
    rig = Rig("llama", "dense")
    rig.runner.capture(graphs)
    for name in (0, 5, 3, 4):
        rig.begin(name)
    rig.step(0, 5)
    gone = [rig.slots[name] for name in (0, 5)]
    rig.end(0)
    rig.end(5)
    before = graphs.num_captures
    rig.step(3, 4)
    assert graphs.num_captures == before + 1
    assert rig.kv.layer(0).keys[gone].isnan().all()
    rig.close()


def test_long_sequences_have_graphs_of_their_own(graphs: FakeCapture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graphs, "_FIRST_MOST_KEYS", 8)
    eager, rig = Rig("llama", "dense"), Rig("llama", "dense")
    rig.runner.capture(graphs)
    at_first = graphs.num_captures
    rig.run()
    eager.run()
    assert rig.texts == eager.texts
    assert graphs.num_captures > at_first
    rig.close()
    eager.close()


def test_a_failing_capture_is_said_once_and_steps_are_launched(
    graphs: FakeCapture, caplog: pytest.LogCaptureFixture
) -> None:
    eager, rig = Rig("llama", "virtual"), Rig("llama", "virtual")
    graphs.fails = RuntimeError("operation not permitted when stream is capturing")
    with caplog.at_level(logging.WARNING):
        rig.runner.capture(graphs)
        rig.run()
    eager.run()
    assert rig.texts == eager.texts
    assert graphs.num_replays == 0
    (record,) = caplog.records
    assert "not permitted" in record.getMessage()
    assert "enforce_eager" in record.getMessage()
    rig.close()
    eager.close()


def test_a_capture_that_fails_later_leaves_the_others_in_use(
    graphs: FakeCapture, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_graphs, "_FIRST_MOST_KEYS", 8)
    eager, rig = Rig("llama", "dense"), Rig("llama", "dense")
    rig.runner.capture(graphs)
    graphs.fails = torch.OutOfMemoryError("CUDA out of memory")
    with caplog.at_level(logging.WARNING):
        rig.run()
    eager.run()
    assert rig.texts == eager.texts
    assert graphs.num_replays > 0
    (record,) = caplog.records
    assert "kv_memory" in record.getMessage()
    rig.close()
    eager.close()


def test_what_ended_a_capture_is_named(graphs: FakeCapture, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig("llama", "dense")
    try:
        try:
            raise ValueError("the model asked the device for a number")
        finally:
            raise RuntimeError("the capture was invalidated")
    except RuntimeError as error:
        graphs.fails = error
    rig.runner.capture(graphs)
    assert "the model asked the device" in caplog.text.splitlines()[0]
    rig.close()


def test_a_model_that_asks_the_device_cannot_be_captured(
    graphs: FakeCapture, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig("llama", "dense")
    norm = rig.model.model.norm
    forward = norm.forward
    norm.forward = lambda x: forward(x) if x.abs().max().item() >= 0 else x
    rig.runner.capture(graphs)
    assert "not permitted when stream is capturing: aten.item" in caplog.text
    rig.close()


def test_a_kernel_that_cannot_be_captured_says_why() -> None:
    rig = Rig("llama", "dense")
    assert rig.runner.uncapturable is None
    rig.close()
    plain = Rig("llama", "dense")
    plain.runner.close()
    runner = ModelRunner(plain.model, probe(plain.model), plain.kv, "sdpa")
    assert "sdpa: it computes sequence by sequence" in str(runner.uncapturable)
    runner.close()


def test_the_scratch_slot_comes_back(graphs: FakeCapture) -> None:
    rig = Rig("llama", "virtual")
    before = rig.kv.num_free_slots
    rig.runner.capture(graphs)
    assert rig.kv.num_free_slots == before - 1
    rig.runner.launch_eagerly()
    assert rig.kv.num_free_slots == before
    rig.close()
    alone = Rig("llama", "dense", num_slots=1)
    with pytest.raises(OutOfMemoryError, match="beside the sequences' own"):
        alone.runner.capture(graphs)
    assert alone.kv.num_free_slots == 1
    alone.close()


def test_no_sequence_goes_without_memory_for_the_scratch_slot(
    graphs: FakeCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig("llama", "reserved")
    before = rig.kv.num_free_slots
    rig.kv.set_limit(rig.kv.accounts().reserved_nbytes // before)  # one sequence's
    assert rig.kv.fits(rig.kv.max_len)
    with pytest.raises(OutOfMemoryError, match="would lack"):
        rig.runner.capture(graphs)
    assert rig.kv.num_free_slots == before
    rig.close()


def test_sizes() -> None:
    assert batch_sizes(0) == ()
    assert batch_sizes(1) == (1,)
    assert batch_sizes(6) == (1, 2, 4, 6)
    assert batch_sizes(30) == (1, 2, 4, 8, 16, 24, 30)
    assert batch_sizes(320)[-4:] == (248, 256, 288, 320)
    assert key_bounds(100) == (100,)
    assert key_bounds(2048) == (2048,)
    assert key_bounds(131072) == (2048, 16384, 131072)
