"""The compiled kernel: every instruction set it is built for, and what must not change a bit of its results."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.attention.cases import BATCHES, BLOCK_SIZES, SPECS, filled, in_blocks
from tests.attention.reference import attend
from vattention import native
from vattention.attention import compiled
from vattention.attention.compiled import NativeKernel, PagedKernel
from vattention.attention.kernel import RaggedBatch
from vattention.core import AttentionSpec
from vattention.kv.manager import LayerView

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="no compiled kernels here")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _everything_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The compiled kernel takes sequences of any number of rows, on one thread unless a test says otherwise."""
    monkeypatch.setattr(compiled, "SHORT_ROWS", 1 << 20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check_all_cases() -> None:
    for spec_name, spec in SPECS.items():
        for batch_name, lengths in BATCHES.items():
            for dtype in DTYPES:
                query, view, batch, sinks = filled(spec, lengths, dtype)
                result = NativeKernel()(query, view, batch, spec, sinks)
                expected = attend(query, view, batch, spec, sinks)
                # One rounding of the result, and those of float32 sums on the way. Matrix tiles take weights as two
                # numbers of 8 bits each, a 16,384th of what rounding to bfloat16 leaves room for.
                bound = expected.abs() * torch.finfo(dtype).eps / 2 + (8e-6 if dtype is torch.bfloat16 else 1.5e-6)
                assert bool(((result.double() - expected).abs() <= bound).all()), (spec_name, batch_name, dtype)


def test_rows_of_any_number_are_rounded_once() -> None:
    check_all_cases()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_every_instruction_set(
    lanes: int, kernels_of_lanes: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = native.Kernels(kernels_of_lanes(lanes))
    monkeypatch.setattr(compiled, "kernels", lambda: built)
    check_all_cases()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "window"), [(6, None), (6, 200), (16, None), (16, 200)])
class TestBits:
    """Results are the same to the last bit, whatever does not concern the sequence."""

    LENGTHS = ((700, 1), (131, 1), (0, 1), (1400, 3), (127, 2))

    def batch(
        self, dtype: torch.dtype, num_heads: int, window: int | None
    ) -> tuple[AttentionSpec, torch.Tensor, LayerView, RaggedBatch]:
        spec = AttentionSpec(num_heads, 2, 64, 64, 0.125, window=window)
        query, view, batch, _ = filled(spec, self.LENGTHS, dtype)
        return spec, query, view, batch

    @pytest.mark.parametrize("threads", [2, 3, 7])
    def test_threads(self, threads: int, dtype: torch.dtype, num_heads: int, window: int | None) -> None:
        spec, query, view, batch = self.batch(dtype, num_heads, window)
        expected = NativeKernel()(query, view, batch, spec, None)
        torch.set_num_threads(threads)
        assert NativeKernel()(query, view, batch, spec, None).equal(expected)

    @pytest.mark.parametrize("block_size", BLOCK_SIZES)
    def test_blocks(self, block_size: int, dtype: torch.dtype, num_heads: int, window: int | None) -> None:
        spec, query, view, batch = self.batch(dtype, num_heads, window)
        paged = in_blocks(view, batch, spec, block_size)
        expected = NativeKernel()(query, view, batch, spec, None)
        assert PagedKernel()(query, paged, batch, spec, None).equal(expected)

    def test_the_rest_of_the_batch(self, dtype: torch.dtype, num_heads: int, window: int | None) -> None:
        spec, query, view, batch = self.batch(dtype, num_heads, window)
        together = NativeKernel()(query, view, batch, spec, None)
        for slot, first_row, num_rows, start in batch.spans:
            for row in range(num_rows):
                alone = RaggedBatch(((slot, 0, 1, start + row),))
                mine = slice(first_row + row, first_row + row + 1)
                assert NativeKernel()(query[mine], view, alone, spec, None).equal(together[mine])


def test_many_threads_share_a_long_sequence_exactly() -> None:
    spec = AttentionSpec(8, 4, 64, 32, 0.125, softcap=20.0, has_sinks=True)
    query, view, batch, sinks = filled(spec, [(3000, 1), (40, 1)], torch.float32)
    torch.set_num_threads(4)
    result = NativeKernel()(query, view, batch, spec, sinks)
    assert (result.double() - attend(query, view, batch, spec, sinks)).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [2, 8])
def test_scores_may_be_huge(group: int, dtype: torch.dtype) -> None:
    spec = AttentionSpec(2 * group, 2, 64, 64, 3000.0)
    query, view, batch, _ = filled(spec, [(600, 1)], dtype)
    view.keys[1, 333] = 9 * query[0, ::group]
    query[0] = query[0, ::group].repeat_interleave(group, 0)
    result = NativeKernel()(query, view, batch, spec, None)
    torch.testing.assert_close(result[0], view.values[1, 333].repeat_interleave(group, 0))


@pytest.mark.parametrize(("name", "dtype"), [("gqa", torch.float32), ("groups", torch.bfloat16)])
def test_nan_stays_with_its_sequence(name: str, dtype: torch.dtype) -> None:
    spec = SPECS[name]
    query, view, batch, _ = filled(spec, [(20, 1), (200, 1)], dtype)
    view.keys[2, 7] = torch.nan
    result = NativeKernel()(query, view, batch, spec, None)
    assert result[0].isnan().all()
    assert result[1].isfinite().all()


def test_half_precision_keeps_small_and_large_numbers() -> None:
    """One key, so that the result is its value: all float16 patterns but NaN."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    numbers = patterns[~patterns.isnan()].reshape(1, -1, 1, 2)
    spec = AttentionSpec(1, 1, 2, 2, 1.0, window=1)
    view = LayerView(torch.zeros_like(numbers), numbers)
    rows = numbers.shape[1]
    batch = RaggedBatch(tuple((0, row, 1, row) for row in range(rows)))
    query = torch.zeros(rows, 1, 2, dtype=torch.float16)
    assert NativeKernel()(query, view, batch, spec, None)[:, 0].equal(numbers[0, :, 0])


MATRIX_TILES = NativeKernel().heads(AttentionSpec(1, 1, 32, 32, 1.0))


@pytest.fixture
def _long_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences with more than one row go to the kernel for them."""
    monkeypatch.setattr(compiled, "SHORT_ROWS", 1)
    library = native.kernels()
    if library is None or not library.attention.can_prefill(MATRIX_TILES, torch.bfloat16):
        pytest.skip("no matrix tiles here")


@pytest.mark.usefixtures("_long_spans")
class TestPrefill:
    """native/prefill.c: blocks of keys meet blocks of queries."""

    SPECS = (
        AttentionSpec(4, 1, 256, 256, 0.0625),
        AttentionSpec(4, 1, 256, 256, 0.0625, window=200),
        AttentionSpec(6, 2, 64, 128, 0.125, window=17),
        AttentionSpec(5, 5, 32, 32, 0.2, softcap=3.0),
        AttentionSpec(8, 2, 128, 96, 0.09, softcap=30.0, window=130),
        AttentionSpec(3, 1, 64, 64, -0.1),
    )
    LENGTHS = ((0, 2), (0, 300), (700, 33), (129, 257), (5, 1), (1000, 128), (127, 3))

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    @pytest.mark.parametrize("threads", [1, 3])
    def test_equals_the_reference(self, spec: AttentionSpec, threads: int) -> None:
        torch.set_num_threads(threads)
        query, view, batch, _ = filled(spec, self.LENGTHS, torch.bfloat16)
        result = NativeKernel()(query, view, batch, spec, None)
        expected = attend(query, view, batch, spec, None)
        # A rounding of the result, and one of each weight, of which the larger ones share the sum.
        bound = expected.abs() * 2**-8 + view.values.float().nan_to_num().abs().max() * 2**-8
        assert bool(((result.double() - expected).abs() <= bound).all())
        assert float((result.double() - expected).abs().mean()) < 2e-3

    @pytest.mark.parametrize("block_size", BLOCK_SIZES)
    def test_blocks_do_not_change_a_bit(self, block_size: int) -> None:
        spec = self.SPECS[4]
        query, view, batch, _ = filled(spec, self.LENGTHS, torch.bfloat16)
        expected = NativeKernel()(query, view, batch, spec, None)
        paged = in_blocks(view, batch, spec, block_size)
        assert PagedKernel()(query, paged, batch, spec, None).equal(expected)

    @pytest.mark.parametrize("cuts", [(2, 299), (128, 256), (31, 33, 290)])
    def test_chunks_do_not_change_a_bit(self, cuts: tuple[int, ...]) -> None:
        for spec in (*self.SPECS, AttentionSpec(64, 64, 64, 64, 0.125)):
            query, view, batch, _ = filled(spec, [(70, 302)], torch.bfloat16)
            expected = NativeKernel()(query, view, batch, spec, None)
            ((slot, _, _, start),) = batch.spans
            edges = (0, *cuts, 302)
            parts = [RaggedBatch(((slot, 0, until - begin, start + begin),)) for begin, until in pairwise(edges)]
            results = [
                NativeKernel()(query[begin:until], view, part, spec, None)
                for part, (begin, until) in zip(parts, pairwise(edges), strict=True)
            ]
            assert torch.cat(results).equal(expected)

    def test_heads_that_are_packed_apart(self) -> None:
        """A long history of many heads is more than is packed at a time."""
        spec = AttentionSpec(10, 5, 128, 128, 0.1)
        query, view, batch, _ = filled(spec, [(16_000, 3)], torch.bfloat16)
        result = NativeKernel()(query, view, batch, spec, None)
        assert float((result.double() - attend(query, view, batch, spec, None)).abs().max()) < 2e-3

    def test_scores_may_be_huge(self) -> None:
        for factor in (1e6, 1e8, 1e12):
            spec = AttentionSpec(4, 2, 64, 64, factor)
            query, view, batch, _ = filled(spec, [(0, 400)], torch.bfloat16)
            result = NativeKernel()(query, view, batch, spec, None)
            ((slot, _, _, _),) = batch.spans
            assert result.isfinite().all()
            assert bool((result.float().abs() <= view.values[slot, :400].float().abs().max() * 1.01).all())

    def test_what_does_not_fit_is_not_claimed(self) -> None:
        library, kernel = native.kernels(), NativeKernel()
        assert library is not None
        for spec, dtype in (
            (AttentionSpec(2, 1, 48, 64, 1.0), torch.bfloat16),
            (AttentionSpec(2, 1, 64, 40, 1.0), torch.bfloat16),
            (AttentionSpec(2, 1, 64, 64, 1.0), torch.float32),
            (AttentionSpec(2, 1, 64, 64, 1.0), torch.float16),
        ):
            assert not library.attention.can_prefill(kernel.heads(spec), dtype)

    def test_a_window_leaves_what_is_before_it_alone(self) -> None:
        """Memory before a window may be gone; not-a-number stands for it, and for what comes after the sequence."""
        spec = self.SPECS[1]
        query, view, batch, _ = filled(spec, [(700, 60)], torch.bfloat16)
        expected = NativeKernel()(query, view, batch, spec, None)
        ((slot, _, num_rows, start),) = batch.spans
        for numbers in (view.keys, view.values):
            numbers[slot, : start - 199] = torch.nan
            numbers[slot, start + num_rows :] = torch.nan
        assert NativeKernel()(query, view, batch, spec, None).equal(expected)
