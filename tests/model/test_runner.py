from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.attention.dense import DenseManager
from tests.model.architectures import ARCHITECTURES, MAX_LEN, VOCAB_SIZE
from vattention.core import Chunk
from vattention.errors import ConfigError, UnsupportedModelError
from vattention.model.hook import implementation
from vattention.model.probe import ModelAttention, probe
from vattention.model.runner import ModelRunner

A, B = list(range(3, 23)), list(range(40, 53))


class Rig:
    """A model, its runner and a cache."""

    def __init__(self, architecture: str, kernel: str = "auto") -> None:
        self.model = ARCHITECTURES[architecture]()
        attention = probe(self.model)
        self.kv = DenseManager(attention.cache_specs, num_slots=4, max_len=MAX_LEN)
        self.runner = ModelRunner(self.model, attention, self.kv, kernel)

    def own(self, prompt: list[int]) -> torch.Tensor:
        with self.runner.suspended(), torch.inference_mode():
            logits: torch.Tensor = self.model(torch.tensor([prompt]), use_cache=False).logits[0]
        return logits


@pytest.fixture(params=["llama", "opt", "gpt2", "gemma2", "gemma3n"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(request.param)
    yield rig
    rig.runner.close()


def test_logits_come_in_the_order_of_the_chunks(rig: Rig) -> None:
    logits = rig.runner.forward([Chunk(2, 0, A, 3), Chunk(0, 0, B, len(B))])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, torch.cat([rig.own(A)[-3:], rig.own(B)]), atol=1e-4, rtol=1e-4)


def test_only_wanted_rows_have_logits(rig: Rig) -> None:
    logits = rig.runner.forward([Chunk(0, 0, A[:5], 0), Chunk(1, 0, B, 1), Chunk(3, 0, A[:5], 0)])
    torch.testing.assert_close(logits, rig.own(B)[-1:], atol=1e-4, rtol=1e-4)


def test_the_middle_of_a_prompt_has_none_and_counts_all_the_same(rig: Rig) -> None:
    assert rig.runner.forward([Chunk(1, 0, A[:9], 0)]).shape == (0, VOCAB_SIZE)
    logits = rig.runner.forward([Chunk(1, 9, A[9:], 1), Chunk(3, 0, B, 1)])
    torch.testing.assert_close(logits, torch.cat([rig.own(A)[-1:], rig.own(B)[-1:]]), atol=1e-4, rtol=1e-4)


def test_final_soft_caps_stay() -> None:
    rig = Rig("gemma2")
    logits = rig.runner.forward([Chunk(0, 0, A, len(A))])
    assert logits.abs().max() <= 10.0
    assert logits.abs().max() > 5.0
    rig.runner.close()


def test_kernels_are_chosen_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vattention.attention.compiled.kernels", lambda: None)
    for architecture, kernel in (("llama", "sdpa"), ("gpt-oss", "eager"), ("gemma2", "eager")):
        rig = Rig(architecture)
        assert rig.runner.kernels == (kernel,) * 3
        rig.runner.close()


def test_a_kernel_that_cannot_is_refused_and_leaves_the_model_alone() -> None:
    with pytest.raises(ConfigError, match="sinks"):
        Rig("gpt-oss", "sdpa")


def test_close_gives_the_model_back() -> None:
    rig = Rig("llama")
    assert implementation(rig.model) != "eager"
    rig.runner.close()
    rig.runner.close()
    assert implementation(rig.model) == "eager"


def test_two_runners_of_two_models_do_not_meet() -> None:
    rigs = Rig("llama"), Rig("mistral")
    for rig, prompt in zip(rigs, (A, B), strict=True):
        logits = rig.runner.forward([Chunk(0, 0, prompt, 1)])
        torch.testing.assert_close(logits, rig.own(prompt)[-1:], atol=1e-4, rtol=1e-4)
        assert rig.kv.layer(0).keys[0, len(prompt) - 1].isfinite().all()
        assert rig.kv.layer(0).keys[0, len(prompt) :].isnan().all()
    for rig in rigs:
        rig.runner.close()


def test_a_layer_that_is_left_out_is_noticed() -> None:
    rig = Rig("llama")
    layers = rig.model.model.layers
    rig.model.model.layers = layers[:2]
    with pytest.raises(UnsupportedModelError, match="called 2 of 3 attention layers"):
        rig.runner.forward([Chunk(0, 0, A, 1)])
    rig.model.model.layers = torch.nn.ModuleList([layers[0], layers[0], layers[2]])
    with pytest.raises(UnsupportedModelError, match="layer 0 was called out of turn"):
        rig.runner.forward([Chunk(0, 0, A, 1)])
    rig.runner.close()


def test_the_model_cannot_run_past_the_runner() -> None:
    rig = Rig("llama")
    with pytest.raises(UnsupportedModelError, match="out of turn"):
        rig.model(torch.tensor([A]), use_cache=False)
    rig.runner.close()


def test_several_runners_of_one_model_do_not_meet() -> None:
    first = Rig("llama")
    second = ModelRunner(first.model, probe_again(first), first.kv, "auto")
    assert second.forward([Chunk(0, 0, A, 1)]).shape == (1, VOCAB_SIZE)
    second.close()
    first.runner.close()


def probe_again(rig: Rig) -> ModelAttention:
    with rig.runner.suspended():
        return probe(rig.model)
