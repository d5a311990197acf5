"""Which way to compute a linear layer is taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.model.linears import DTYPES
from vattention.model import linear_methods as subject
from vattention.model.linear_methods import fastest_method
from vattention.model.native_linear import NativeLinear
from vattention.model.torch_linear import TorchLinear


def test_the_fastest_method_is_one_that_this_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    for dtype in (*DTYPES, torch.float16):
        assert fastest_method(300, 64, dtype).available(dtype)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(subject, "METHODS", (TorchLinear,))
    assert fastest_method(300, 64, torch.bfloat16) is TorchLinear


@pytest.mark.skipif(not NativeLinear.has_tiles(64, torch.bfloat16), reason="needs a processor with matrix tiles")
def test_nothing_is_measured_where_there_are_matrix_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside busy processes the fastest method may look slow."""

    def never(*_: object) -> float:
        raise AssertionError("measured")

    monkeypatch.setattr(subject, "_mean_log_time", never)
    assert fastest_method(300, 64, torch.bfloat16) is NativeLinear
    for num_in, dtype in ((65, torch.bfloat16), (64, torch.float32)):
        with pytest.raises(AssertionError, match="measured"):
            fastest_method(300, num_in, dtype)


def test_a_slower_method_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(TorchLinear):
        def __call__(self, x: Tensor) -> Tensor:
            super().__call__(x)
            return super().__call__(x)

    monkeypatch.setattr(subject, "METHODS", (TorchLinear, Twice))
    assert fastest_method(2000, 300, torch.float32) is TorchLinear
