"""FlexAttention over prompts: which blocks of keys it is told to read, and that torch compiles it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from tests.attention.cases import SPECS, filled
from tests.attention.reference import attend
from tests.attention.subjects import EagerDecoder
from vattention.attention import flex
from vattention.attention.flex import BLOCK, FlexPrompts, blocks
from vattention.attention.prompts_apart import PromptsApart
from vattention.kv.manager import LayerView


@pytest.mark.parametrize("window", [None, 1, 60, 128, 129, 300, 1000])
@pytest.mark.parametrize(
    ("num_rows", "num_keys"),
    [
        (2, 2),
        (2, 129),
        (127, 127),
        (128, 128),
        (129, 129),
        (300, 300),
        (5, 700),
        (200, 511),
        (256, 512),
        (130, 900),
    ],
)
def test_blocks_are_those_that_rows_see(num_rows: int, num_keys: int, window: int | None) -> None:
    own = torch.arange(num_keys - num_rows, num_keys)[:, None]
    keys = torch.arange(num_keys)[None]
    seen = (keys <= own) & (keys > own - (window or num_keys))
    found = blocks(num_rows, num_keys, window)
    assert min(*found.partial.shape, *found.full.shape) >= 2
    for row in range(len(found.num_full)):
        rows = seen[row * BLOCK : (row + 1) * BLOCK]
        partial = found.partial[row, : found.num_partial[row]].tolist()
        full = found.full[row, : found.num_full[row]].tolist()
        assert sorted({*partial, *full}) == sorted([*partial, *full])
        for key in range(-(-num_keys // BLOCK)):
            block = rows[:, key * BLOCK : (key + 1) * BLOCK]
            is_whole = block.shape[1] == BLOCK and bool(block.all()) and rows.shape[0] > 0
            expected = full if is_whole else partial if block.any() else []
            assert (key in full, key in partial) == (expected is full, expected is partial)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compiles_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """For processors, which takes the same lists of blocks; there it lacks what sinks need."""
    monkeypatch.setattr(flex, "_compiled", lambda: torch.compile(flex_attention, dynamic=True))
    kernel = PromptsApart("flex", LayerView, FlexPrompts(runs_on="cpu"), (EagerDecoder(),))
    for lengths in (((5, 4),), ((300, 200), (0, 140))):
        spec = SPECS["wide, softcap"]
        query, view, batch, _ = filled(spec, lengths)
        result = kernel(query, view, batch, spec, None)
        torch.testing.assert_close(result.double(), attend(query, view, batch, spec), atol=2e-6, rtol=0)


def test_slots_that_are_too_long_for_its_numbers_are_refused() -> None:
    spec = SPECS["wide"]
    near = torch.empty(1, 16, 2, 64, dtype=torch.bfloat16, device="meta")
    assert FlexPrompts(runs_on="meta").unsupported(spec, LayerView(near, near)) is None
    far = torch.empty_strided((1, 2**20, 2, 64), (2**31, 2**11, 64, 1), dtype=torch.bfloat16, device="meta")
    assert "per-layer" in str(FlexPrompts(runs_on="meta").unsupported(spec, LayerView(far, far)))
