"""Decode attention in Triton: the kernels themselves. Importing this needs the package `triton`.

Split along the keys, as in Flash-Decoding (T. Dao, D. Haziza, F. Massa, G. Sizov, 2023): each program computes
some of a sequence's keys for all query heads that share a key head, with the softmax of FlashAttention (arXiv
2205.14135), and a second kernel puts the parts together. Nothing outside a sequence's keys is read.
"""

# Triton compiles these functions itself, and knows no annotations but its own.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=("slots", "first_keys", "end_keys"))
def partial_attention(  # noqa: PLR0915  # a kernel is one function
    query,
    keys,
    values,
    tables,
    slots,
    first_keys,
    end_keys,
    sinks,
    output,
    parts,
    maxima,
    sums,
    scale,
    softcap,
    query_row,
    query_head,
    key_outer,
    key_token,
    key_head,
    value_outer,
    value_token,
    value_head,
    table_row,
    group: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    key_width: tl.constexpr,
    value_width: tl.constexpr,
    num_rows: tl.constexpr,
    strip: tl.constexpr,
    num_splits: tl.constexpr,
    block_size: tl.constexpr,
    has_softcap: tl.constexpr,
    has_sinks: tl.constexpr,
    is_aligned: tl.constexpr,
):
    """One sequence, some query heads of one key head, one of `num_splits` parts of the keys.

    `keys` and `values` are addresses, since Triton may refuse tensors that begin where no memory is mapped.
    `outer` is a slot, or a block where `block_size` is not 0. Without parts the result goes to `output`
    [n, num_heads, value_dim]; else to `parts` [n, num_heads, num_splits, value_dim], not yet divided by `sums`.
    """
    keys = keys.to(tl.pointer_type(query.dtype.element_ty))
    values = values.to(tl.pointer_type(query.dtype.element_ty))
    if is_aligned:
        keys = tl.multiple_of(keys, 16)
        values = tl.multiple_of(values, 16)
    sequence = tl.program_id(0)
    blocks_of_rows = (group + num_rows - 1) // num_rows
    kv_head = tl.program_id(1) // blocks_of_rows
    split = tl.program_id(2)
    num_heads = tl.num_programs(1) // blocks_of_rows * group

    begin = tl.load(first_keys + sequence)
    end = tl.load(end_keys + sequence)
    slot = tl.load(slots + sequence).to(tl.int64)
    share = tl.cdiv(tl.cdiv(end - begin, num_splits), strip) * strip
    first = begin + split * share
    last = tl.minimum(first + share, end)

    in_group = tl.program_id(1) % blocks_of_rows * num_rows + tl.arange(0, num_rows)
    is_head = in_group < group
    heads = kv_head * group + in_group
    key_dims = tl.arange(0, key_width)
    value_dims = tl.arange(0, value_width)
    rows = tl.load(
        query + sequence.to(tl.int64) * query_row + heads[:, None] * query_head + key_dims[None, :],
        mask=is_head[:, None] & (key_dims < key_dim)[None, :],
        other=0.0,
    )
    maximum = tl.full([num_rows], float("-inf"), tl.float32)
    total = tl.zeros([num_rows], tl.float32)
    result = tl.zeros([num_rows, value_width], tl.float32)

    for at in range(first, last, strip):
        positions = at + tl.arange(0, strip)
        is_key = positions < last
        if block_size:
            entries = tables + slot * table_row + positions // block_size
            outer = tl.load(entries, mask=is_key, other=0).to(tl.int64)
            token = (positions % block_size).to(tl.int64)
        else:
            outer = slot
            token = positions.to(tl.int64)
        key_at = keys + outer * key_outer + token * key_token + kv_head * key_head
        keys_here = tl.load(
            key_at[:, None] + key_dims[None, :],
            mask=is_key[:, None] & (key_dims < key_dim)[None, :],
            other=0.0,
        )
        scores = tl.dot(rows, tl.trans(keys_here), input_precision="ieee") * scale
        if has_softcap:
            # tanh by an exponential that does not overflow
            small = tl.exp(-2.0 * tl.abs(scores) / softcap)
            capped = softcap * (1.0 - small) / (1.0 + small)
            scores = tl.where(scores < 0.0, -capped, capped)
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        shrunk = tl.exp(maximum - higher)
        weights = tl.exp(scores - higher[:, None])
        value_at = values + outer * value_outer + token * value_token + kv_head * value_head
        values_here = tl.load(
            value_at[:, None] + value_dims[None, :],
            mask=is_key[:, None] & (value_dims < value_dim)[None, :],
            other=0.0,
        )
        total = total * shrunk + tl.sum(weights, 1)
        result = result * shrunk[:, None] + tl.dot(
            weights.to(values_here.dtype), values_here, input_precision="ieee"
        )
        maximum = higher

    at = sequence.to(tl.int64) * num_heads + heads
    is_value = is_head[:, None] & (value_dims < value_dim)[None, :]
    if num_splits == 1:
        if has_sinks:
            sink = tl.load(sinks + heads, mask=is_head, other=0.0)
            higher = tl.maximum(maximum, sink)
            shrunk = tl.exp(maximum - higher)
            total = total * shrunk + tl.exp(sink - higher)
            result = result * shrunk[:, None]
        result = result / total[:, None]
        place = output + at[:, None] * value_dim + value_dims[None, :]
        tl.store(place, result.to(output.dtype.element_ty), mask=is_value)
    else:
        at = at * num_splits + split
        tl.store(parts + at[:, None] * value_dim + value_dims[None, :], result, mask=is_value)
        tl.store(maxima + at, maximum, mask=is_head)
        tl.store(sums + at, total, mask=is_head)


@triton.jit
def join_parts(
    parts,
    maxima,
    sums,
    sinks,
    output,
    value_dim: tl.constexpr,
    value_width: tl.constexpr,
    num_splits: tl.constexpr,
    has_sinks: tl.constexpr,
):
    """One sequence and query head: the parts, each by its share of the softmax's denominator."""
    at = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    splits = tl.arange(0, num_splits)
    dims = tl.arange(0, value_width)
    maximum = tl.load(maxima + at * num_splits + splits)
    total = tl.load(sums + at * num_splits + splits)
    places = parts + (at * num_splits + splits)[:, None] * value_dim + dims[None, :]
    result = tl.load(places, mask=(dims < value_dim)[None, :], other=0.0)
    highest = tl.max(maximum, 0)
    if has_sinks:
        sink = tl.load(sinks + tl.program_id(1))
        highest = tl.maximum(highest, sink)
    # A part without keys has the maximum -inf, and thereby no weight.
    weights = tl.exp(maximum - highest)
    denominator = tl.sum(weights * total, 0)
    if has_sinks:
        denominator += tl.exp(sink - highest)
    result = tl.sum(result * weights[:, None], 0) / denominator
    tl.store(output + at * value_dim + dims, result.to(output.dtype.element_ty), mask=dims < value_dim)
