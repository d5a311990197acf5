from __future__ import annotations

import torch

from vattention.attention.kernel import RaggedBatch
from vattention.attention.sequences import sequences, tables
from vattention.core import Chunk
from vattention.kv.manager import PagedLayerView


def batch(*chunks: tuple[int, int, int]) -> RaggedBatch:
    """Of (slot, start, number of tokens)."""
    return RaggedBatch.of([Chunk(slot, start, [0] * count, 0) for slot, start, count in chunks])


def test_decodes_and_others_are_apart() -> None:
    mixed = batch((3, 9, 1), (1, 0, 4), (5, 2, 1), (2, 10, 2))
    decodes, others = sequences(mixed, None)
    assert decodes.is_decode
    assert not others.is_decode
    assert decodes.slots.tolist() == [3, 5]
    assert decodes.end_keys.tolist() == decodes.num_keys.tolist() == [10, 3]
    assert isinstance(decodes.rows, torch.Tensor)
    assert decodes.rows.tolist() == [0, 5]
    assert others.row_starts.tolist() == [0, 4, 6]
    assert isinstance(others.rows, torch.Tensor)
    assert others.rows.tolist() == [1, 2, 3, 4, 6, 7]
    assert others.own_spans == ((1, 0, 4, 0), (2, 4, 2, 10))
    assert (others.num_rows, others.most_rows, others.most_keys) == (6, 4, 12)


def test_neighbouring_rows_are_a_slice() -> None:
    (decodes,) = sequences(batch((3, 9, 1), (1, 4, 1)), None)
    assert decodes.rows == slice(0, 2)
    _, others = sequences(batch((3, 9, 1), (1, 4, 2), (2, 0, 3)), None)
    assert others.rows == slice(1, 6)


def test_worked_out_once_for_all_layers() -> None:
    mixed = batch((3, 9, 1), (1, 0, 4))
    assert sequences(mixed, None)[0] is sequences(mixed, None)[0]
    assert sequences(mixed, 4)[0] is not sequences(mixed, None)[0]


def test_a_window_begins_where_memory_does() -> None:
    decodes, others = sequences(batch((0, 9, 1), (1, 2, 1), (2, 10, 3)), 4)
    assert decodes.first_keys.tolist() == [6, 0]
    assert decodes.num_keys.tolist() == [4, 3]
    assert decodes.window_left == -1  # a row sees all of these keys
    assert others.begins == (7,)
    assert others.num_keys.tolist() == [6]
    assert others.window_left == 3
    assert sequences(batch((0, 0, 4)), 4)[0].window_left == -1


def test_tables_begin_with_the_first_block_that_is_read() -> None:
    view = PagedLayerView(
        torch.zeros(20, 2, 1, 8), torch.zeros(20, 2, 1, 8), torch.arange(20, dtype=torch.int32).view(2, 10)
    )
    (whole,) = sequences(batch((1, 4, 1), (0, 8, 1)), None)
    found = tables(view, whole)
    assert found.blocks.tolist() == [[10, 11, 12, 13, 14], [0, 1, 2, 3, 4]]
    assert found.num_keys.tolist() == list(found.lengths) == [5, 9]
    assert found.window_left == -1
    (cut,) = sequences(batch((1, 4, 1), (0, 8, 1)), 4)
    found = tables(view, cut)
    assert found.blocks[0, :3].tolist() == [10, 11, 12]
    assert found.blocks[1, :3].tolist() == [2, 3, 4]
    assert found.num_keys.tolist() == list(found.lengths) == [5, 5]
    assert found.window_left == 3
    assert tables(view, cut) is found
    assert tables(PagedLayerView(view.keys, view.values, view.tables.clone()), cut) is not found
