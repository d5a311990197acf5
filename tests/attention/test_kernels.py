"""Every kernel, on every feature it claims, against attention's definition in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.attention.cases import BATCHES, SPECS, filled, views
from tests.attention.reference import attend
from vattention.attention import eager, sdpa
from vattention.attention.registry import KERNELS

CPU = torch.device("cpu")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest absolute error; results are of the order of 1."""

SUPPORTED = [
    (kernel, name)
    for kernel in KERNELS
    for name, spec in SPECS.items()
    if KERNELS[kernel].unsupported(spec, torch.float32, CPU) is None
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Waking threads takes longer than these tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spec_name", SPECS)
def test_computes_attention(spec_name: str, dtype: torch.dtype) -> None:
    spec = SPECS[spec_name]
    for batch_name, lengths in BATCHES.items():
        query, view, batch, sinks = filled(spec, lengths, dtype)
        expected = attend(query, view, batch, spec, sinks)
        for kernel in (KERNELS[name] for name, supported in SUPPORTED if supported == spec_name):
            for stored in views(kernel.reads, view, batch, spec):
                result = kernel(query, stored, batch, spec, sinks)
                assert result.shape == (len(batch.slots), spec.num_heads, spec.value_dim)
                assert result.dtype == dtype
                error = (result.double() - expected).abs().max()
                assert error <= TOLERANCE[dtype], (kernel.name, batch_name, stored.keys.shape)


@pytest.mark.parametrize("max_scores", [1, 16, 100])
@pytest.mark.parametrize(("kernel", "spec_name"), SUPPORTED)
def test_cutting_rows_changes_nothing(
    kernel: str, spec_name: str, max_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdpa, "_MAX_MASK", max_scores)
    monkeypatch.setattr(eager, "_MAX_SCORES", max_scores)
    spec = SPECS[spec_name]
    query, view, batch, sinks = filled(spec, BATCHES["mixed"])
    expected = attend(query, view, batch, spec, sinks)
    for stored in views(KERNELS[kernel].reads, view, batch, spec):
        result = KERNELS[kernel](query, stored, batch, spec, sinks)
        torch.testing.assert_close(result.double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("window", {"window": None}),
        ("softcap", {"softcap": None}),
        ("sinks", {"has_sinks": False}),
        ("own scale", {"scale": 0.25}),
    ],
)
def test_a_dropped_feature_shows(name: str, dropped: dict[str, float | None]) -> None:
    spec = SPECS[name]
    query, view, batch, sinks = filled(replace(spec, window=None), BATCHES["mixed"])
    expected = attend(query, view, batch, spec, sinks)
    less = replace(spec, **dropped)  # type: ignore[arg-type]
    result = KERNELS["eager"](query, view, batch, less, sinks if less.has_sinks else None)
    assert (result - expected).abs().max() > 0.1


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_scores_do_not_overflow(kernel: str) -> None:
    spec = replace(SPECS["gqa"], scale=60.0)
    query, view, batch, _ = filled(spec, BATCHES["mixed"])
    for stored in views(KERNELS[kernel].reads, view, batch, spec):
        assert KERNELS[kernel](query, stored, batch, spec, None).isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_writes_nothing_to_the_cache(kernel: str) -> None:
    query, dense, batch, _ = filled(SPECS["gqa"], BATCHES["mixed"])
    for view in views(KERNELS[kernel].reads, dense, batch, SPECS["gqa"]):
        before = view.keys.clone(), view.values.clone()
        KERNELS[kernel](query, view, batch, SPECS["gqa"], None)
        torch.testing.assert_close((view.keys, view.values), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_takes_any_strides(kernel: str) -> None:
    """All of a token's layers side by side, and queries that are no view of one contiguous tensor."""
    spec = SPECS["gqa"]
    query, dense, batch, _ = filled(spec, BATCHES["mixed"])
    for view in views(KERNELS[kernel].reads, dense, batch, spec):
        wide = torch.full((*view.keys.shape[:2], 9, *view.keys.shape[2:]), torch.nan)
        wide[:, :, 3], wide[:, :, 7] = view.keys, view.values
        apart = replace(view, keys=wide[:, :, 3], values=wide[:, :, 7])
        every_other = torch.stack([query, -query], dim=-1).flatten(-2)[..., ::2]
        result = KERNELS[kernel](every_other, apart, batch, spec, None)
        torch.testing.assert_close(result, KERNELS[kernel](query, view, batch, spec, None))
