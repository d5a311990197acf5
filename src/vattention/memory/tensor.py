"""Where an address becomes a tensor: the only place in this room that knows torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vattention.memory.libc import bytes_at


class _DeviceBytes:
    """Memory as the CUDA array interface describes it, version 3."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            # Nothing to wait for: the memory has never been written.
            "stream": None,
        }
        self.owner = owner


def as_tensor(address: int, nbytes: int, *, device: str, owner: object) -> torch.Tensor:
    """Memory at `address` as a tensor [nbytes] of uint8, whose storage keeps `owner` alive.

    Bytes, since the array interfaces have no bfloat16; `strided` gives them a type.

    Args:
        device: as the driver's capabilities name it; on "meta" the tensor has a shape and no memory.
    """
    kind = torch.device(device).type
    if kind == "meta":
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    if kind == "cpu":
        return torch.from_numpy(bytes_at(address, nbytes, owner))
    # With the device given, torch does not look the address up, which fails where nothing is mapped yet.
    return torch.as_tensor(_DeviceBytes(address, nbytes, owner), device=device)


def strided(
    buffer: torch.Tensor,
    dtype: torch.dtype,
    offset_nbytes: int,
    shape: Sequence[int],
    strides_nbytes: Sequence[int],
) -> torch.Tensor:
    """A view of bytes as a tensor of `dtype`.

    Args:
        buffer: [n] of uint8, as `as_tensor` makes it.
        offset_nbytes: where element 0 begins, from the buffer's beginning.
        shape: in elements.
        strides_nbytes: one per dimension.

    Raises:
        ValueError: the offset or a stride is no multiple of the element size, or an element lies outside.
    """
    size = dtype.itemsize
    if any(nbytes % size for nbytes in (offset_nbytes, *strides_nbytes)):
        raise ValueError(f"offset {offset_nbytes} and strides {strides_nbytes} must be multiples of {size} bytes")
    last = offset_nbytes + sum((n - 1) * stride for n, stride in zip(shape, strides_nbytes, strict=True))
    if min(shape, default=1) > 0 and last + size > len(buffer):
        raise ValueError(f"a tensor {tuple(shape)} of {dtype} ends at byte {last + size}, behind {len(buffer)}")
    whole = buffer[: len(buffer) // size * size].view(dtype)
    return whole.as_strided(tuple(shape), [nbytes // size for nbytes in strides_nbytes], offset_nbytes // size)
