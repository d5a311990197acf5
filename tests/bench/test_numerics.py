from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from vattention import native
from vattention.attention.compiled import NativeKernel
from vattention.bench import numerics
from vattention.bench.numerics import (
    SPEC,
    Settings,
    Subject,
    in_blocks,
    inputs,
    measure,
    stepwise,
    table,
    to_json,
)

SMALL = Settings(lengths=(5, 40), scales=(2.0,))


@pytest.fixture(scope="module")
def deviations() -> list[numerics.Deviation]:
    return [found for part in measure(SMALL) for found in part]


def test_every_kernel_is_near_the_reference(deviations: list[numerics.Deviation]) -> None:
    bounds = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01}
    kernels = {found.kernel for found in deviations}
    assert {"sdpa", "eager", "gathered 16", "rounded", "stepwise"} <= kernels
    assert len(deviations) == len(kernels) * 3 * 2 * 2
    for found in deviations:
        assert 0 <= found.mean <= found.maximum < bounds[found.dtype] or found.kernel == "stepwise"


def test_nothing_beats_rounding(deviations: list[numerics.Deviation]) -> None:
    key = ("dtype", "phase", "length", "scale")
    best = {tuple(getattr(d, k) for k in key): d.mean for d in deviations if d.kernel == "rounded"}
    assert all(d.mean >= best[tuple(getattr(d, k) for k in key)] for d in deviations)


@pytest.mark.skipif(native.kernels() is None, reason="no compiled kernels here")
def test_blocks_change_no_bit(deviations: list[numerics.Deviation]) -> None:
    compiled = [d for d in deviations if d.kernel.startswith("paged") or d.kernel == "native 128"]
    for length in SMALL.lengths:
        for dtype in ("float32", "bfloat16", "float16"):
            same = {
                (d.maximum, d.mean) for d in compiled if (d.length, d.dtype, d.phase) == (length, dtype, "decode")
            }
            assert len(same) == 1


def test_the_reference_is_attention_by_its_definition() -> None:
    query, view, batch = inputs(torch.float64, 7, 3, 1.0, seed=1)
    result = stepwise(query, view, batch)
    scores = [float(query[4, 5] @ view.keys[1, key, 1]) * SPEC.scale for key in range(6)]
    weights = [math.exp(score) for score in scores]
    expected = sum(w / sum(weights) * view.values[1, key, 1] for key, w in enumerate(weights))
    torch.testing.assert_close(result[4, 5], expected)


def test_a_wrong_kernel_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(NativeKernel):
        def __call__(self, *args: Any, **keywords: Any) -> torch.Tensor:
            return super().__call__(*args, **keywords) * 1.001

    monkeypatch.setattr(numerics, "subjects", lambda dtype: [Subject(Wrong(), "wrong")])
    if native.kernels() is not None:
        assert next(measure(SMALL))[0].maximum > 1e-4


def test_blocks_hold_what_the_slots_hold() -> None:
    _, view, _ = inputs(torch.float32, 10, 1, 1.0, seed=0)
    paged = in_blocks(view, 4)
    assert paged.keys.shape[:2] == (12, 4)
    for position in range(10):
        assert paged.values[int(paged.tables[2, position // 4]), position % 4].equal(view.values[2, position])


def found(kernel: str, maximum: float, length: int = 5) -> numerics.Deviation:
    return numerics.Deviation(kernel, "bfloat16", "decode", length, 2.0, maximum, maximum / 10)


def test_kernels_that_look_the_same_share_a_row() -> None:
    two_lengths = [found(kernel, 0.5, 1000) for kernel in ("a", "b", "c")]
    assert table([found("a", 0.02), found("b", 0.02), found("c", 0.03), *two_lengths]).split("\n") == [
        "### bfloat16, decode, inputs of scale 2",
        "",
        "| 5 tokens | 1,000 tokens | kernels |",
        "|---|---|---|",
        "| 2.0e-02, 2.0e-03 | 5.0e-01, 5.0e-02 | a, b |",
        "| 3.0e-02, 3.0e-03 | 5.0e-01, 5.0e-02 | c |",
        "",
    ]


def test_every_kernel_is_in_the_table(deviations: list[numerics.Deviation]) -> None:
    text = table([d for d in deviations if (d.dtype, d.phase) == ("bfloat16", "decode")])
    rows = [line.strip("| ").split(" | ")[-1].split(", ") for line in text.split("\n")[4:-1]]
    assert sorted(kernel for row in rows for kernel in row) == sorted({d.kernel for d in deviations})


def test_json_says_how_to_repeat_it() -> None:
    written = to_json(Settings(lengths=(8, 16), scales=(0.5,), seed=3), [found("a", 0.1)])
    assert written["command"] == "vattention numerics --length 8 --length 16 --scale 0.5 --seed 3"
    assert written["deviations"][0]["mean"] == 0.01
    assert {"vattention", "torch"} == written["versions"].keys()
