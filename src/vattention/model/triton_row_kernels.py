"""Norms, rotary embeddings and gates in Triton: the kernels themselves. Importing this needs the package `triton`.

As those in C (`native/norm_rows.h`, `rotate_rows.h`, `gate_rows.h`) they read each number once, and compute in
float32.
"""

# Triton compiles these functions itself, and knows no annotations but its own.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm(x, scale, y, epsilon, width: tl.constexpr, block: tl.constexpr):
    """One row of `width` numbers."""
    at = tl.arange(0, block)
    is_number = at < width
    begin = tl.program_id(0).to(tl.int64) * width
    numbers = tl.load(x + begin + at, mask=is_number, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(numbers * numbers, 0) / width + epsilon)
    result = numbers * factor * tl.load(scale + at, mask=is_number, other=0.0)
    tl.store(y + begin + at, result.to(y.dtype.element_ty), mask=is_number)


@triton.jit
def gate(gate_up, y, linear, cubic, width, block: tl.constexpr):
    """`block` numbers of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    is_number = at < width
    gates = tl.load(gate_up + row * 2 * width + at, mask=is_number, other=0.0).to(tl.float32)
    ups = tl.load(gate_up + row * 2 * width + width + at, mask=is_number, other=0.0).to(tl.float32)
    steepness = gates * (linear + cubic * gates * gates)
    # The sigmoid by an exponential that does not overflow.
    small = tl.exp(-tl.abs(steepness))
    share = tl.where(steepness < 0.0, small, 1.0) / (1.0 + small)
    result = gates * share * ups
    tl.store(y + row * width + at, result.to(y.dtype.element_ty), mask=is_number)


@triton.jit
def rotate(
    x,
    cosines,
    sines,
    scales,
    query_epsilon,
    key_epsilon,
    width,
    num_queries,
    num_keys,
    half: tl.constexpr,
    block: tl.constexpr,
    heads_at_a_time: tl.constexpr,
    norms_queries: tl.constexpr,
    norms_keys: tl.constexpr,
):
    """Some query heads or some key heads of one token, in place."""
    token = tl.program_id(0).to(tl.int64)
    num_query_programs = (num_queries + heads_at_a_time - 1) // heads_at_a_time
    is_keys = tl.program_id(1) >= num_query_programs
    first = tl.where(
        is_keys,
        num_queries + (tl.program_id(1) - num_query_programs) * heads_at_a_time,
        tl.program_id(1) * heads_at_a_time,
    )
    end = tl.where(is_keys, num_queries + num_keys, num_queries)
    heads = first + tl.arange(0, heads_at_a_time)
    dims = tl.arange(0, block)
    is_dim = dims < half
    is_number = (heads < end)[:, None] & is_dim[None, :]
    low_at = x + token * width + heads[:, None] * (2 * half) + dims[None, :]
    low = tl.load(low_at, mask=is_number, other=0.0).to(tl.float32)
    high = tl.load(low_at + half, mask=is_number, other=0.0).to(tl.float32)
    if norms_queries or norms_keys:
        squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
        factors = tl.rsqrt(squares / (2 * half) + tl.where(is_keys, key_epsilon, query_epsilon))
        scale_at = scales + tl.where(is_keys, 2 * half, 0) + dims
        low_scale = tl.load(scale_at, mask=is_dim, other=0.0)
        high_scale = tl.load(scale_at + half, mask=is_dim, other=0.0)
        is_normed = tl.where(is_keys, norms_keys, norms_queries)
        low = tl.where(is_normed, low * factors[:, None] * low_scale[None, :], low)
        high = tl.where(is_normed, high * factors[:, None] * high_scale[None, :], high)
    angle_at = token * (2 * half) + dims
    low_cosine = tl.load(cosines + angle_at, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    high_cosine = tl.load(cosines + angle_at + half, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    low_sine = tl.load(sines + angle_at, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    high_sine = tl.load(sines + angle_at + half, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    rotated_low = low * low_cosine - high * low_sine
    rotated_high = high * high_cosine + low * high_sine
    tl.store(low_at, rotated_low.to(x.dtype.element_ty), mask=is_number)
    tl.store(low_at + half, rotated_high.to(x.dtype.element_ty), mask=is_number)
