"""Weights in 8 or 4 bits: which whole numbers and scales stand for a weight, and how they lie in memory.

Activations stay as they are. A group of 32 weights of one output, along the inner dimension, shares a scale in
bfloat16. native/quantized.c describes the packed form, and computes with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vattention.model.panels import COLUMNS
from vattention.native import WeightFormat
from vattention.native.huge import Empty, huge_empty

GROUP = 32
"""Inputs whose weights share a scale."""

_SCALES_NBYTES = 2 * COLUMNS
_BLOCK_NUMEL = 1 << 20
"""Weights that are quantized at a time: temporary memory is some twenty bytes for each."""
_LOWER, _UPPERMOST = 0x0F0F0F0F, ~0x7F7F7F7F
"""Of each byte of an int32."""


class Format(Protocol):
    """A kind of whole numbers.

    Attributes:
        form: what the compiled code calls it.
        bits: of a number in memory.
    """

    form: ClassVar[WeightFormat]
    bits: ClassVar[int]

    @classmethod
    def quantize(cls, groups: Tensor) -> tuple[Tensor, Tensor]:
        """What stands for float32 [..., 32]: codes int8 [..., 32], and scales bfloat16 [...]."""
        ...

    @classmethod
    def numbers(cls, codes: Tensor) -> Tensor:
        """The whole numbers, int8, that codes stand for."""
        ...

    @classmethod
    def places(cls, panels: Tensor) -> tuple[Tensor, ...]:
        """Views of panels [panels, groups, nbytes]: the scales' bytes [panels, groups, 64], and parts of the lines.

        The parts are [panels, groups, lines, 32, 4], where a group's lines follow each other.
        """
        ...

    @classmethod
    def split(cls, words: Tensor) -> Tensor:
        """A column's four bytes of each of a group's lines, int32 [..., bits], as they lie in memory."""
        ...

    @classmethod
    def join(cls, words: Tensor) -> Tensor:
        """The inverse of `split`."""
        ...


class _WholeLines:
    """Of formats whose groups lie one after the other, with lines as they are."""

    @classmethod
    def places(cls, panels: Tensor) -> tuple[Tensor, ...]:
        return panels[..., :_SCALES_NBYTES], _by_line(panels[..., _SCALES_NBYTES:])

    @classmethod
    def split(cls, words: Tensor) -> Tensor:
        return words

    @classmethod
    def join(cls, words: Tensor) -> Tensor:
        return words


class Int8(_WholeLines):
    """Whole numbers from -127 to 127, the largest of a group being one of the ends."""

    form: ClassVar[WeightFormat] = WeightFormat.INT8
    bits: ClassVar[int] = 8

    @classmethod
    def quantize(cls, groups: Tensor) -> tuple[Tensor, Tensor]:
        scales = (groups.abs().amax(-1) / 127.0).bfloat16()
        codes = (groups * _reciprocal(scales)[..., None]).round_().clamp_(-127, 127)
        return codes.to(torch.int8), scales

    @classmethod
    def numbers(cls, codes: Tensor) -> Tensor:
        return codes


class HalvedInt8(Int8):
    """The same, of which the upper halves of 4 bits lie apart from the lower ones."""

    form: ClassVar[WeightFormat] = WeightFormat.HALVES

    @classmethod
    def places(cls, panels: Tensor) -> tuple[Tensor, ...]:
        num_panels, num_groups, nbytes = panels.shape
        lower_nbytes = (nbytes - _SCALES_NBYTES) // 2
        sizes = [num_panels * num_groups * (nbytes - lower_nbytes), num_panels * num_groups * lower_nbytes]
        upper, lower = (half.view(num_panels, num_groups, -1) for half in torch.split(panels.view(-1), sizes))
        return upper[..., :_SCALES_NBYTES], _by_line(upper[..., _SCALES_NBYTES:]), _by_line(lower)

    @classmethod
    def split(cls, words: Tensor) -> Tensor:
        raised = words ^ _UPPERMOST
        first, second = raised[..., 0::2], raised[..., 1::2]
        upper = ((first >> 4) & _LOWER) | (second & ~_LOWER)
        return torch.cat((upper, (first & _LOWER) | ((second & _LOWER) << 4)), -1)

    @classmethod
    def join(cls, words: Tensor) -> Tensor:
        upper, lower = words.chunk(2, -1)
        first = ((upper & _LOWER) << 4) | (lower & _LOWER)
        second = (upper & ~_LOWER) | ((lower >> 4) & _LOWER)
        return torch.stack((first, second), -1).view(words.shape) ^ _UPPERMOST


class Int4(_WholeLines):
    """Sixteen numbers that lie as a normal distribution's quantiles do (NF4), a group's largest being -127 or 127.

    T. Dettmers, A. Pagnoni, A. Holtzman, L. Zettlemoyer, "QLoRA: Efficient Finetuning of Quantized LLMs" (2023),
    section 3 and appendix E; rounded to 127ths.
    """

    form: ClassVar[WeightFormat] = WeightFormat.INT4
    bits: ClassVar[int] = 4
    book: ClassVar[tuple[int, ...]] = (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127)

    @classmethod
    def quantize(cls, groups: Tensor) -> tuple[Tensor, Tensor]:
        scales = (groups.abs().amax(-1) / 127.0).bfloat16()
        book = torch.tensor(cls.book, dtype=torch.float32)
        codes = torch.bucketize(groups * _reciprocal(scales)[..., None], (book[1:] + book[:-1]) / 2, out_int32=True)
        return codes.to(torch.int8), scales

    @classmethod
    def numbers(cls, codes: Tensor) -> Tensor:
        return torch.tensor(cls.book, dtype=torch.int8)[codes.int()]


def _reciprocal(scales: Tensor) -> Tensor:
    """Of zero, zero: a group of zeros stays one."""
    wide = scales.float()
    return torch.where(wide == 0, 0.0, 1.0 / wide)


def group_nbytes(form: type[Format]) -> int:
    """Memory of a group of 32 columns."""
    return _SCALES_NBYTES + COLUMNS * GROUP * form.bits // 8


def pack(form: type[Format], weight: Tensor, empty: Empty = huge_empty) -> Tensor:
    """[out, in] quantized and packed for quantized.c: bytes [ceil(out / 32), ceil(in / 32), nbytes of a group]."""
    num_out, num_in = weight.shape
    num_panels, num_groups = math.ceil(num_out / COLUMNS), math.ceil(num_in / GROUP)
    panels = empty(num_panels * num_groups * group_nbytes(form), torch.uint8).view(num_panels, num_groups, -1)
    own, *places = form.places(panels)
    for part in _parts(num_panels, num_groups):
        rows = weight[part.start * COLUMNS : part.stop * COLUMNS].float()
        if num_in % GROUP or len(rows) % COLUMNS:
            rows = F.pad(rows, (0, -num_in % GROUP, 0, -len(rows) % COLUMNS))
        codes, scales = form.quantize(rows.reshape(-1, num_groups, GROUP))
        own[part] = _by_panel(scales).view(torch.uint8)
        lines = _lines(form, codes)
        for place, some in zip(places, torch.split(lines, [place.shape[2] for place in places], 2), strict=True):
            place[part] = some
    return panels


def unpack(form: type[Format], panels: Tensor, num_out: int, num_in: int, dtype: torch.dtype) -> Tensor:
    """What packed panels stand for, [num_out, num_in]."""
    weight = torch.empty(num_out, num_in, dtype=dtype)
    own, *places = form.places(panels)
    for part in _parts(*panels.shape[:2]):
        scales = own[part].contiguous().view(torch.bfloat16).transpose(1, 2).float()
        numbers = form.numbers(_codes(form, torch.cat([place[part] for place in places], 2)))
        rows = numbers.view(*scales.shape, GROUP) * scales[..., None]
        to = weight[part.start * COLUMNS : part.stop * COLUMNS]
        to.copy_(rows.view(-1, rows.shape[2] * GROUP)[: len(to), :num_in])
    return weight


def unpack_rows(form: type[Format], panels: Tensor, rows: Tensor, num_in: int, dtype: torch.dtype) -> Tensor:
    """Some rows [len(rows), num_in] of what panels stand for."""
    num_panels, num_groups, _ = panels.shape
    panel, column = rows // COLUMNS, rows % COLUMNS
    own, *places = form.places(panels)
    scales = own.view(num_panels, num_groups, COLUMNS, 2).transpose(1, 2)[panel, column]
    # Of each line, four bytes are a column's.
    words = [place.view(torch.int32).squeeze(4).permute(0, 3, 1, 2)[panel, column] for place in places]
    numbers = form.numbers(_steps(form, torch.cat(words, 2)))
    wide = numbers.view(-1, num_groups, GROUP) * scales.contiguous().view(torch.bfloat16).float()
    return wide.view(-1, num_groups * GROUP)[:, :num_in].to(dtype)


def _by_line(lines: Tensor) -> Tensor:
    """Bytes [panels, groups, nbytes] as [panels, groups, lines, 32, 4], of the same memory."""
    return lines.view(*lines.shape[:2], -1, COLUMNS, 4)


def _parts(num_panels: int, num_groups: int) -> Iterator[slice]:
    """Panels, some at a time."""
    step = max(1, _BLOCK_NUMEL // (num_groups * GROUP * COLUMNS))
    return (slice(start, min(start + step, num_panels)) for start in range(0, num_panels, step))


def _by_panel(rows: Tensor) -> Tensor:
    """[panels * 32, groups, ...] as contiguous [panels, groups, 32, ...]."""
    return rows.view(-1, COLUMNS, *rows.shape[1:]).transpose(1, 2).contiguous()


def _lines(form: type[Format], codes: Tensor) -> Tensor:
    """Codes [panels * 32, groups, 32] as bytes [panels, groups, lines, 32, 4], with a line for each bit."""
    num_groups = codes.shape[1]
    words = codes.view(torch.int32)
    if form.bits == 4:
        words = ((words & 0x0F0F) | ((words >> 12) & 0xF0F0)).to(torch.int16).view(torch.int32)
    # A column's four bytes of a line move as one.
    by_line = form.split(_swapped(words)).view(-1, COLUMNS, num_groups, form.bits).permute(0, 2, 3, 1).contiguous()
    return by_line.view(torch.uint8).view(*by_line.shape, 4)


def _codes(form: type[Format], lines: Tensor) -> Tensor:
    """The inverse of `_lines`: [panels, groups, lines, 32, 4] to [panels, 32, groups, 32]."""
    num_panels, num_groups = lines.shape[:2]
    columns = lines.view(torch.int32).squeeze(4).permute(0, 3, 1, 2).contiguous()
    return _steps(form, columns.view(-1, num_groups, form.bits)).view(num_panels, COLUMNS, num_groups, GROUP)


def _steps(form: type[Format], words: Tensor) -> Tensor:
    """A column's words [rows, groups, lines] as its codes, int8 [rows, groups, 32]."""
    words = _swapped(form.join(words))
    if form.bits == 4:
        words = words.view(torch.int16).to(torch.int32)
        words = (words & 0x0F0F) | ((words & 0xF0F0) << 12)
    return words.view(torch.int8)


def _swapped(words: Tensor) -> Tensor:
    """int32 with its middle bytes exchanged: in memory the numbers of a step lie together."""
    return (words & ~0x00FFFF00) | ((words >> 8) & 0x0000FF00) | ((words << 8) & 0x00FF0000)
