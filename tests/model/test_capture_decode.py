"""Decode steps as graphs under a whole engine, and what becomes of graphs that do not compute the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
import torch

from tests.model.fake_graphs import DeviceKernel, FakeCapture
from tests.model.tiny import tiny_llama
from vattention.attention import registry
from vattention.config import EngineConfig
from vattention.engine.engine import LLMEngine
from vattention.engine.parts import Parts
from vattention.kv.build import create_manager
from vattention.kv.manager import KVManager, LayerView
from vattention.model import capture_decode as capture_decode_module
from vattention.model.capture_decode import capture_decode
from vattention.model.cuda_graphs import Replay
from vattention.model.probe import probe
from vattention.model.runner import ModelRunner
from vattention.sampling_params import SamplingParams

MAX_LEN = 128
PROMPTS = [list(range(5, 5 + length)) for length in (3, 40, 17, 1, 9)]


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> FakeCapture:
    capture = FakeCapture()
    added = {"device": DeviceKernel(LayerView, capture.opaque)}
    monkeypatch.setattr(registry, "KERNELS", MappingProxyType(added | dict(registry.KERNELS)))
    return capture


class Rig:
    def __init__(self, kernel: str = "auto", kv_memory: str = "64MiB", num_slots: int = 4) -> None:
        self.num_preemptions = 0
        self.model = tiny_llama()
        self.config = EngineConfig(
            model="none", max_num_seqs=num_slots, max_num_batched_tokens=16, kv_memory=kv_memory
        )
        attention = probe(self.model)
        self.manager: KVManager = create_manager(
            self.config, attention.cache_specs, dtype=torch.float32, device="cpu", max_len=MAX_LEN
        )
        self.runner = ModelRunner(self.model, attention, self.manager, kernel)

    def generate(self) -> list[list[int]]:
        parts = Parts("none", self.manager, self.runner, None, 400, MAX_LEN, frozenset(), {})
        engine = LLMEngine(self.config, parts)
        for index, prompt in enumerate(PROMPTS):
            params = SamplingParams(temperature=0, max_tokens=70 - 10 * index, ignore_eos=True)
            engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
        found: dict[str, list[int]] = {}
        while engine.has_unfinished_requests():
            outputs = engine.step()
            found |= {output.request_id: output.outputs[0].token_ids for output in outputs}
            self.num_preemptions += sum(
                o.metrics.num_preemptions for o in outputs if o.finished and o.metrics is not None
            )
        engine.close()
        return [found[str(index)] for index in range(len(PROMPTS))]


def test_an_engine_generates_the_same_tokens(graphs: FakeCapture) -> None:
    expected = Rig().generate()
    rig = Rig()
    capture_decode(rig.model, rig.runner, rig.manager, graphs)
    assert graphs.num_replays == 1  # verifying them
    assert rig.generate() == expected
    assert graphs.num_replays > 60


def test_preempted_sequences_come_back_to_other_slots(graphs: FakeCapture) -> None:
    expected = Rig().generate()
    rig = Rig(kv_memory="72KiB")
    capture_decode(rig.model, rig.runner, rig.manager, graphs)
    assert rig.generate() == expected
    assert rig.num_preemptions > 0


def test_a_single_sequence_has_graphs_too(graphs: FakeCapture, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(num_slots=2)
    capture_decode(rig.model, rig.runner, rig.manager, graphs)
    assert not caplog.records
    assert (graphs.num_captures, graphs.num_replays) == (1, 1)
    rig.generate()
    assert graphs.num_replays > 60


def test_a_kernel_that_cannot_be_captured_is_no_trouble(
    graphs: FakeCapture, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig("sdpa")
    with caplog.at_level(logging.INFO):
        capture_decode(rig.model, rig.runner, rig.manager, graphs)
    assert "sequence by sequence" in caplog.text
    assert graphs.num_captures == 0
    rig.generate()


class Forgetful:
    """Replays compute nothing."""

    in_use_nbytes = 0

    def __init__(self, inner: FakeCapture) -> None:
        self._inner = inner

    def __call__(self, function: Callable[[], object]) -> Replay:
        self._inner(function)
        return lambda: None


def test_graphs_that_compute_something_else_are_left_out(
    graphs: FakeCapture, caplog: pytest.LogCaptureFixture
) -> None:
    expected, rig = Rig().generate(), Rig()
    free = rig.manager.num_free_slots
    capture_decode(rig.model, rig.runner, rig.manager, Forgetful(graphs))
    assert "computes something else" in caplog.text
    assert rig.manager.num_free_slots == free
    assert rig.generate() == expected


@pytest.mark.parametrize("where", ["torch.zeros", "Capture.in_use_nbytes", "verify"])
def test_a_device_without_memory_for_graphs_goes_on_without(
    where: str, graphs: FakeCapture, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, rig = Rig().generate(), Rig()
    free = rig.manager.num_free_slots

    def short(*arguments: Any, **keywords: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        match where:
            case "torch.zeros":
                patch.setattr(torch, "zeros", short)
            case "Capture.in_use_nbytes":
                patch.setattr(FakeCapture, "in_use_nbytes", property(short))
            case _:
                patch.setattr(capture_decode_module, "verify", short)
        capture_decode(rig.model, rig.runner, rig.manager, graphs)
    assert "CUDA out of memory" in caplog.text
    assert rig.manager.num_free_slots == free
    assert rig.generate() == expected
    assert graphs.num_replays == 0


def test_the_limit_is_read_again_behind_graphs(graphs: FakeCapture, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    events: list[Any] = []
    monkeypatch.setattr(rig.manager, "refresh_limit", lambda: events.append(graphs.num_captures))
    capture_decode(rig.model, rig.runner, rig.manager, graphs)
    assert events == [3]
    rig.generate()
