"""Every kernel, on every feature it claims, against attention's definition in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.attention.cases import BATCHES, SPECS, filled
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


@pytest.mark.parametrize("batch_name", BATCHES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("kernel", "spec_name"), SUPPORTED)
def test_computes_attention(kernel: str, spec_name: str, dtype: torch.dtype, batch_name: str) -> None:
    spec = SPECS[spec_name]
    query, view, batch, sinks = filled(spec, BATCHES[batch_name], dtype)
    result = KERNELS[kernel](query, view, batch, spec, sinks)
    assert result.shape == (len(batch.slots), spec.num_heads, spec.value_dim)
    assert result.dtype == dtype
    expected = attend(query, view, batch, spec, sinks)
    torch.testing.assert_close(result.double(), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("max_scores", [1, 16, 100])
@pytest.mark.parametrize(("kernel", "spec_name"), SUPPORTED)
def test_blocks_of_rows_change_nothing(
    kernel: str, spec_name: str, max_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdpa, "_MAX_MASK", max_scores)
    monkeypatch.setattr(eager, "_MAX_SCORES", max_scores)
    spec = SPECS[spec_name]
    query, view, batch, sinks = filled(spec, BATCHES["mixed"])
    result = KERNELS[kernel](query, view, batch, spec, sinks)
    expected = attend(query, view, batch, spec, sinks)
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
    assert KERNELS[kernel](query, view, batch, spec, None).isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_writes_nothing_to_the_cache(kernel: str) -> None:
    query, view, batch, _ = filled(SPECS["gqa"], BATCHES["mixed"])
    before = view.keys.clone(), view.values.clone()
    KERNELS[kernel](query, view, batch, SPECS["gqa"], None)
    torch.testing.assert_close((view.keys, view.values), before, rtol=0, atol=0, equal_nan=True)
