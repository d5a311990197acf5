"""Decode steps whose sequences only the device knows, by every kernel that says it can be captured."""

from __future__ import annotations

import pytest
import torch

from tests.attention.cases import SPECS, filled
from tests.attention.reference import attend
from tests.attention.subjects import SUBJECTS
from tests.attention.test_kernels import dtype_of, tolerance
from vattention.attention.fixed_batch import NO_SLOT, fixed_batch
from vattention.attention.registry import KERNELS
from vattention.attention.sequences import sequences

LENGTHS = {
    "short": ((1, 1), (17, 1), (0, 1), (30, 1)),
    "long": ((127, 1), (299, 1), (128, 1), (3, 1)),
}
CAPTURABLE = [name for name, subject in SUBJECTS.items() if subject.kernel.uncapturable is None]


@pytest.mark.parametrize("most_keys", [300, 305])
@pytest.mark.parametrize("batch_name", LENGTHS)
@pytest.mark.parametrize(
    "spec_name", ["gqa", "window", "window of one", "sinks and window", "wide", "wide, window"]
)
@pytest.mark.parametrize("subject", CAPTURABLE)
def test_the_host_knows_no_more_than_the_longest(
    subject: str, spec_name: str, batch_name: str, most_keys: int
) -> None:
    spec, tried, dtype = SPECS[spec_name], SUBJECTS[subject], dtype_of(subject)
    # A sequence as long as any may be gives all of them room in their tables.
    query, view, batch, sinks = filled(spec, (*LENGTHS[batch_name], (most_keys - 1, 1)), dtype, tried.device)
    expected = attend(query, view, batch, spec, sinks)
    for stored in tried.views(view, batch, spec):
        fixed = fixed_batch(batch.slots, batch.positions, most_keys, {None, spec.window})
        result = tried.kernel(query, stored, fixed, spec, sinks)
        torch.testing.assert_close(result.double().cpu(), expected, atol=tolerance(tried.device, dtype), rtol=0)


def test_kernels_that_ask_the_host_say_so() -> None:
    reasons = {name: kernel.uncapturable for name, kernel in KERNELS.items()}
    assert {name for name, reason in reasons.items() if reason is None} == {
        "flash_attention",
        "flash_attention_3",
        "flash_attention_4",
        "flash_attention_paged",
        "flex",
        "flashinfer_paged_prompts",
        "flashinfer_prompts",
        "torch_flash",
        "torch_flash_paged",
        "triton",
        "triton_paged",
    }
    assert "host" in str(reasons["sdpa"])
    assert "plans" in str(reasons["flashinfer"])


def test_numbers_follow_the_tensors() -> None:
    slots, positions = torch.tensor([4, 2, 7]), torch.tensor([9, 0, 3])
    batch = fixed_batch(slots, positions, 1024, {None, 4})
    assert batch.is_decode
    assert {span[0] for span in batch.spans} == {NO_SLOT}
    (whole,), (cut,) = sequences(batch, None), sequences(batch, 4)
    assert whole.slots.tolist() == cut.slots.tolist() == [4, 2, 7]
    assert whole.first_keys.tolist() == [0, 0, 0]
    assert whole.end_keys.tolist() == whole.num_keys.tolist() == [10, 1, 4]
    assert cut.first_keys.tolist() == [6, 0, 0]
    assert cut.num_keys.tolist() == [4, 1, 4]
    assert cut.row_starts.tolist() == [0, 1, 2, 3]
    assert (whole.most_keys, cut.most_keys) == (1024, 4)
    assert any(cut.begins)
    assert cut.is_decode
