"""Every kernel, on every feature it claims, against attention's definition in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.attention.cases import BATCHES, SPECS, filled
from tests.attention.reference import attend
from tests.attention.subjects import SUBJECTS
from vattention.attention import eager, sdpa
from vattention.attention.registry import KERNELS

TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest absolute error; results are of the order of 1."""

TOLERANCE_ON_GPUS = TOLERANCE | {torch.float32: 2e-5}
"""Torch's own kernels make products of float32 out of several shorter ones there."""

DEVICES = sorted({subject.device for subject in SUBJECTS.values()})


def tolerance(device: str, dtype: torch.dtype) -> float:
    return (TOLERANCE if device == "cpu" else TOLERANCE_ON_GPUS)[dtype]


def dtype_of(subject: str) -> torch.dtype:
    """The most exact type that the kernel takes."""
    return next(dtype for dtype in TOLERANCE if SUBJECTS[subject].computes(SPECS["wide"], dtype))


SUPPORTED = [
    (subject, name)
    for subject in SUBJECTS
    for name, spec in SPECS.items()
    if SUBJECTS[subject].computes(spec, dtype_of(subject))
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
@pytest.mark.parametrize("device", DEVICES)
def test_computes_attention(device: str, spec_name: str, dtype: torch.dtype) -> None:
    spec = SPECS[spec_name]
    subjects = {name: subject for name, subject in SUBJECTS.items() if subject.device == device}
    for batch_name, lengths in BATCHES.items():
        query, view, batch, sinks = filled(spec, lengths, dtype, device)
        expected = attend(query, view, batch, spec, sinks)
        for name, subject in subjects.items():
            for stored in subject.views(view, batch, spec) if batch_name in subject.batches else ():
                result = subject.kernel(query, stored, batch, spec, sinks)
                assert result.shape == (len(batch.slots), spec.num_heads, spec.value_dim)
                assert result.dtype == dtype
                error = (result.double().cpu() - expected).abs().max()
                assert error <= tolerance(device, dtype), (name, batch_name, stored.keys.shape)


@pytest.mark.parametrize("max_scores", [1, 16, 100])
@pytest.mark.parametrize(("subject", "spec_name"), SUPPORTED)
def test_cutting_rows_changes_nothing(
    subject: str, spec_name: str, max_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdpa, "_MAX_MASK", max_scores)
    monkeypatch.setattr(eager, "_MAX_SCORES", max_scores)
    spec, dtype, tried = SPECS[spec_name], dtype_of(subject), SUBJECTS[subject]
    query, view, batch, sinks = filled(spec, BATCHES["mixed"], dtype, tried.device)
    expected = attend(query, view, batch, spec, sinks)
    for stored in tried.views(view, batch, spec):
        result = tried.kernel(query, stored, batch, spec, sinks)
        torch.testing.assert_close(result.double().cpu(), expected, atol=tolerance(tried.device, dtype), rtol=0)


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


@pytest.mark.parametrize("subject", SUBJECTS)
def test_large_scores_do_not_overflow(subject: str) -> None:
    spec, tried = replace(SPECS["wide"], scale=60.0), SUBJECTS[subject]
    query, view, batch, _ = filled(spec, BATCHES["mixed"], dtype_of(subject), tried.device)
    for stored in tried.views(view, batch, spec):
        assert tried.kernel(query, stored, batch, spec, None).isfinite().all()


@pytest.mark.parametrize("subject", SUBJECTS)
def test_writes_nothing_to_the_cache(subject: str) -> None:
    spec, tried = SPECS["wide"], SUBJECTS[subject]
    query, dense, batch, _ = filled(spec, BATCHES["mixed"], dtype_of(subject), tried.device)
    for view in tried.views(dense, batch, spec):
        before = view.keys.clone(), view.values.clone()
        tried.kernel(query, view, batch, spec, None)
        torch.testing.assert_close((view.keys, view.values), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_takes_any_strides(subject: str) -> None:
    """All of a token's layers side by side, and queries that are no view of one contiguous tensor."""
    spec, tried = SPECS["wide"], SUBJECTS[subject]
    query, dense, batch, _ = filled(spec, BATCHES["mixed"], dtype_of(subject), tried.device)
    for view in tried.views(dense, batch, spec):
        wide = view.keys.new_full((*view.keys.shape[:2], 9, *view.keys.shape[2:]), torch.nan)
        wide[:, :, 3], wide[:, :, 7] = view.keys, view.values
        apart = replace(view, keys=wide[:, :, 3], values=wide[:, :, 7])
        every_other = torch.stack([query, -query], dim=-1).flatten(-2)[..., ::2]
        result = tried.kernel(every_other, apart, batch, spec, None)
        torch.testing.assert_close(result, tried.kernel(query, view, batch, spec, None))
