"""What stands for a weight in 8 or 4 bits, and that it comes out of memory as it went in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vattention.model.quantize import GROUP, Format, Int4, Int8, group_nbytes, pack, unpack, unpack_rows

DTYPES = (torch.float32, torch.bfloat16)
FORMATS: list[type[Format]] = [Int8, Int4]


def groups_of(weight: Tensor) -> Tensor:
    """[out, groups, 32] float32, padded with zeros."""
    padded = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % GROUP))
    return padded.view(len(weight), -1, GROUP)


def some_weight(num_out: int, num_in: int, seed: int = 0) -> Tensor:
    """Groups of very different size, and some of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_out, num_in, generator=generator)
    sizes = torch.logspace(-20, 10, num_out)[torch.randperm(num_out, generator=generator)]
    weight *= sizes[:, None]
    weight[num_out // 2, : 2 * GROUP] = 0.0
    return weight


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 100), st.integers(1, 140), st.integers(0, 99), st.sampled_from((torch.float32, torch.bfloat16))
)
def test_what_is_packed_comes_out(
    form: type[Format], num_out: int, num_in: int, seed: int, dtype: torch.dtype
) -> None:
    weight = some_weight(num_out, num_in, seed).to(dtype)
    codes, scales = form.quantize(groups_of(weight))
    expected = (form.numbers(codes) * scales.float()[..., None]).view(num_out, -1)[:, :num_in].to(dtype)
    panels = pack(form, weight)
    assert panels.shape == (-(-num_out // 32), -(-num_in // GROUP), group_nbytes(form))
    assert torch.equal(unpack(form, panels, num_out, num_in, dtype), expected)
    some = torch.randint(num_out, (7,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack_rows(form, panels, some, num_in, dtype), expected[some])
    assert unpack_rows(form, panels, some[:0], num_in, dtype).shape == (0, num_in)


def test_8_bits_are_within_half_a_step() -> None:
    groups = groups_of(some_weight(300, 256))
    codes, scales = Int8.quantize(groups)
    steps = scales.float()[..., None]
    assert bool(((groups - codes * steps).abs() <= 0.5001 * steps).all())
    # One of each group is the longest number there is.
    assert bool((codes.abs().amax(-1)[groups.abs().amax(-1) > 0] >= 126).all())


def test_4_bits_are_the_nearest_of_the_code_book() -> None:
    groups = groups_of(some_weight(300, 256))
    codes, scales = Int4.quantize(groups)
    steps = scales.float()[..., None]
    errors = (groups - Int4.numbers(codes) * steps).abs()
    assert int(codes.min()) == 0
    assert int(codes.max()) == 15
    for number in Int4.book:
        assert bool((errors <= (groups - number * steps).abs() + 1e-4 * steps.abs()).all())


@pytest.mark.parametrize("form", FORMATS)
def test_zeros_stay_zeros(form: type[Format]) -> None:
    weight = torch.zeros(40, 70)
    assert torch.equal(unpack(form, pack(form, weight), 40, 70, torch.float32), weight)


@pytest.mark.parametrize(("form", "bits"), [(Int8, 8.5), (Int4, 4.5)])
def test_memory(form: type[Format], bits: float) -> None:
    assert pack(form, torch.ones(64, 256)).nbytes * 8 == bits * 64 * 256
