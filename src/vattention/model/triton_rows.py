"""Norms, rotary embeddings and gates by kernels of our own on a GPU, which need nothing but Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vattention.model import triton_row_kernels as written

_HEADS_AT_A_TIME = 4
_GATES_AT_A_TIME = 1024
_NUMBERS_PER_WARP = 512
_MOST_WARPS = 16


@dataclass(frozen=True, slots=True, eq=False)
class TritonRotation:
    """What becomes of a token's query and key heads.

    Attributes:
        num_heads: of queries and of keys.
        scales: float32 [2, head_dim] of both norms, and what they add to the mean of squares.
        is_normed: whether queries and keys are normalised.
    """

    num_heads: tuple[int, int]
    scales: Tensor | None
    epsilons: tuple[float, float]
    is_normed: tuple[bool, bool]
    head_dim: int
    width: int


class TritonRows:
    """`RowKernels` in Triton.

    Args:
        runs_on: the type of device; "cpu" under Triton's interpreter, for tests.
    """

    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset((torch.float32, torch.float16, torch.bfloat16))

    def __init__(self, runs_on: str = "cuda") -> None:
        self.device_type = runs_on

    def rms_norm(self, x: Tensor, scale: Tensor, epsilon: float, y: Tensor) -> None:
        width = scale.numel()
        num_rows = x.numel() // width
        if num_rows:
            # Triton launches on the thread's current device.
            with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
                block = _power_above(width)
                written.rms_norm[(num_rows,)](
                    x, scale, y, epsilon, width=width, block=block, num_warps=_warps(block)
                )

    def gate(self, gate_up: Tensor, linear: float, cubic: float, y: Tensor) -> None:
        num_rows, width = y.shape
        if num_rows:
            block = min(_power_above(width), _GATES_AT_A_TIME)
            with torch.cuda.device_of(y):  # type: ignore[no-untyped-call]
                written.gate[(num_rows, -(-width // block))](
                    gate_up, y, linear, cubic, width, block=block, num_warps=_warps(block)
                )

    def rotation(
        self,
        num_heads: tuple[int, int],
        norms: tuple[tuple[Tensor, float] | None, tuple[Tensor, float] | None],
        head_dim: int,
        width: int,
        dtype: torch.dtype,
    ) -> TritonRotation:
        some = next((norm[0] for norm in norms if norm is not None), None)
        scales = None
        if some is not None:
            scales = torch.stack([torch.ones_like(some) if norm is None else norm[0] for norm in norms])
        query, key = (1.0 if norm is None else norm[1] for norm in norms)
        is_normed = norms[0] is not None, norms[1] is not None
        return TritonRotation(num_heads, scales, (query, key), is_normed, head_dim, width)

    def rotate(self, rotation: TritonRotation, x: Tensor, cosines: Tensor, sines: Tensor) -> None:
        num_tokens = x.shape[0]
        if not num_tokens:
            return
        num_blocks = sum(-(-count // _HEADS_AT_A_TIME) for count in rotation.num_heads)
        half = rotation.head_dim // 2
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            written.rotate[(num_tokens, num_blocks)](
                x,
                cosines,
                sines,
                # Not read where there are no norms.
                cosines if rotation.scales is None else rotation.scales,
                *rotation.epsilons,
                rotation.width,
                *rotation.num_heads,
                half=half,
                block=_power_above(half),
                heads_at_a_time=_HEADS_AT_A_TIME,
                norms_queries=rotation.is_normed[0],
                norms_keys=rotation.is_normed[1],
                num_warps=_warps(2 * half * _HEADS_AT_A_TIME),
            )


def _power_above(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()


def _warps(numbers: int) -> int:
    """Of a program over so many numbers."""
    return max(1, min(_MOST_WARPS, _power_above(numbers) // _NUMBERS_PER_WARP))
