"""How far attention kernels are from a float64 reference.

In the manner of A. Golden et al., "Is Flash Attention Stable?" (arXiv 2405.02803): the same random inputs, already
rounded to the kernel's type, go through each kernel and through float64, and what is reported is the largest and
the mean deviation. Two rows give them a measure: "rounded" is the reference rounded to the type, which no kernel
can beat, and "stepwise" is attention in the type itself, each intermediate result rounded, as textbooks write it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch

from vattention import __version__
from vattention.attention.compiled import STRIP_KEYS, NativeKernel, PagedKernel
from vattention.attention.eager import EagerKernel
from vattention.attention.gathered import GatheredKernel
from vattention.attention.kernel import AttentionKernel, RaggedBatch
from vattention.attention.sdpa import SdpaKernel
from vattention.bench.memory import plots
from vattention.core import AttentionSpec, Chunk
from vattention.kv.manager import CacheView, LayerView, PagedLayerView

SPEC = AttentionSpec(num_heads=8, num_kv_heads=2, key_dim=64, value_dim=64, scale=0.125)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (64, 256, 1024, 4096, 16384)
SCALES = (1.0, 4.0)
ROWS = {"decode": 1, "prefill": 64}
NUM_SEQUENCES = 4
STRIPS = (16, 32, 64, STRIP_KEYS)
BLOCK_SIZES = (1, 16, 256)


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure.

    Attributes:
        lengths: tokens that the last query row sees.
        scales: standard deviations of queries and keys; that of the scores is its square. Values have 1.
        seed: of the inputs.
    """

    lengths: Sequence[int] = LENGTHS
    scales: Sequence[float] = SCALES
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Deviation:
    """One kernel's distance from the reference on one set of inputs.

    Attributes:
        kernel: its name, with its tile: keys in a strip for "native", tokens in a block for those that read blocks.
        phase: "decode", one query row per sequence, or "prefill", a chunk of them.
        maximum, mean: of the absolute differences, over all numbers of the output, which are of the order of 1.
    """

    kernel: str
    dtype: str
    phase: str
    length: int
    scale: float
    maximum: float
    mean: float


def measure(settings: Settings) -> Iterator[list[Deviation]]:
    """Every kernel at every length, for one type, phase and scale after the other."""
    for dtype, phase, scale in product(DTYPES, ROWS, settings.scales):
        found = []
        for length in settings.lengths:
            query, view, batch = inputs(dtype, length, min(ROWS[phase], length), scale, settings.seed)
            exact = stepwise(query.double(), LayerView(view.keys.double(), view.values.double()), batch)
            outputs = {subject.name: subject(query, view, batch) for subject in subjects(dtype)}
            outputs |= {"stepwise": stepwise(query, view, batch), "rounded": exact.to(dtype)}
            for name, output in outputs.items():
                error = (output.double() - exact).abs()
                short = str(dtype).removeprefix("torch.")
                maximum, mean = float(error.max()), float(error.mean())
                found.append(Deviation(name, short, phase, length, scale, maximum, mean))
        yield found


def inputs(
    dtype: torch.dtype, length: int, num_rows: int, scale: float, seed: int
) -> tuple[torch.Tensor, LayerView, RaggedBatch]:
    """Queries of the last rows of sequences of one length, and their cache, the same numbers for all types."""
    generator = torch.Generator().manual_seed(seed)
    count = NUM_SEQUENCES

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    keys = (normal(count, length, SPEC.num_kv_heads, SPEC.key_dim) * scale).to(dtype)
    values = normal(count, length, SPEC.num_kv_heads, SPEC.value_dim).to(dtype)
    query = (normal(count * num_rows, SPEC.num_heads, SPEC.key_dim) * scale).to(dtype)
    batch = RaggedBatch.of([Chunk(slot, length - num_rows, [0] * num_rows, 0) for slot in range(count)])
    return query, LayerView(keys, values), batch


def stepwise(query: torch.Tensor, view: LayerView, batch: RaggedBatch) -> torch.Tensor:
    """Attention by its definition, in the type of its inputs at every step: the reference, given float64."""
    output = torch.empty(query.shape[0], SPEC.num_heads, SPEC.value_dim, dtype=query.dtype)
    group = SPEC.num_heads // SPEC.num_kv_heads
    for slot, first_row, num_rows, start in batch.spans:
        rows = slice(first_row, first_row + num_rows)
        keys, values = (
            x[slot, : start + num_rows].repeat_interleave(group, 1).transpose(0, 1)
            for x in (view.keys, view.values)
        )
        scores = query[rows].transpose(0, 1) @ keys.transpose(1, 2) * SPEC.scale
        seen = torch.ones(num_rows, start + num_rows, dtype=torch.bool).tril(start)
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
        output[rows] = (weights @ values).transpose(0, 1)
    return output


@dataclass(frozen=True, slots=True)
class Subject:
    """A kernel in one of its ways, and the size of the blocks it reads, if it reads blocks."""

    kernel: AttentionKernel[Any]
    name: str
    block_size: int | None = None

    def __call__(self, query: torch.Tensor, view: LayerView, batch: RaggedBatch) -> torch.Tensor:
        return self.kernel(query, self.stored(view), batch, SPEC, None)

    def stored(self, view: LayerView) -> CacheView:
        """The cache as the kernel reads it."""
        return view if self.block_size is None else in_blocks(view, self.block_size)


def subjects(dtype: torch.dtype) -> list[Subject]:
    """Every kernel that computes here, in every way it can be told to."""
    known = (
        *(Subject(NativeKernel(strip), f"native {strip}") for strip in STRIPS),
        Subject(SdpaKernel(), "sdpa"),
        Subject(EagerKernel(), "eager"),
        *(Subject(PagedKernel(), f"paged {size}", size) for size in BLOCK_SIZES),
        Subject(GatheredKernel(), "gathered 16", 16),
    )
    token = torch.empty(1, 1, SPEC.num_kv_heads, SPEC.key_dim, dtype=dtype)
    empty = LayerView(token, token)
    return [s for s in known if s.kernel.unsupported(SPEC, s.stored(empty)) is None]


def in_blocks(view: LayerView, block_size: int) -> PagedLayerView:
    """A copy in blocks that lie in no order."""
    num_slots, length = view.keys.shape[:2]
    per_slot = -(-length // block_size)
    order = torch.randperm(num_slots * per_slot, generator=torch.Generator().manual_seed(0))

    def pool(tensor: torch.Tensor) -> torch.Tensor:
        padded = tensor.new_zeros(num_slots, per_slot * block_size, *tensor.shape[2:])
        padded[:, :length] = tensor
        blocks = torch.empty_like(padded).view(-1, block_size, *tensor.shape[2:])
        blocks[order] = padded.view(blocks.shape)
        return blocks

    return PagedLayerView(pool(view.keys), pool(view.values), order.view(num_slots, per_slot).to(torch.int32))


def table(deviations: Sequence[Deviation]) -> str:
    """One type, phase and scale in Markdown: kernels in rows, lengths in columns; largest and mean deviation.

    Kernels whose figures look the same share a row.
    """
    first = deviations[0]
    lengths = list(dict.fromkeys(found.length for found in deviations))
    kernels: dict[str, list[str]] = {}
    for kernel in dict.fromkeys(found.kernel for found in deviations):
        cells = [f"{f.maximum:.1e}, {f.mean:.1e}" for f in deviations if f.kernel == kernel]
        kernels.setdefault(" | ".join(cells), []).append(kernel)
    return "\n".join(
        [
            f"### {first.dtype}, {first.phase}, inputs of scale {first.scale:g}",
            "",
            f"| {' | '.join(f'{length:,} tokens' for length in lengths)} | kernels |",
            f"|{'---|' * (len(lengths) + 1)}",
            *(f"| {cells} | {', '.join(names)} |" for cells, names in kernels.items()),
            "",
        ]
    )


def to_json(settings: Settings, deviations: Sequence[Deviation]) -> dict[str, Any]:
    """What was measured, and with what."""
    words = ["vattention", "numerics", *(f"--length {length}" for length in settings.lengths)]
    words += [f"--scale {scale:g}" for scale in settings.scales]
    return {
        "command": " ".join([*words, f"--seed {settings.seed}"]),
        "date": date.today().isoformat(),
        "versions": {"vattention": __version__, "torch": torch.__version__},
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "settings": asdict(settings),
        "attention": asdict(SPEC),
        "deviations": [asdict(found) for found in deviations],
    }


def draw(deviations: Sequence[Deviation], path: Path) -> None:
    """Write an SVG: mean deviation over length, one panel for each type, phase and scale.

    Kernels that deviate alike everywhere share a line.

    Raises:
        ConfigError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    pyplot = plots.load()
    curves: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(found.kernel for found in deviations):
        curves.setdefault(tuple(f"{found.mean:.1e}" for found in deviations if found.kernel == name), []).append(
            name
        )
    dtypes = list(dict.fromkeys(found.dtype for found in deviations))
    kinds = list(dict.fromkeys((found.phase, found.scale) for found in deviations))
    figure, panels = pyplot.subplots(
        len(kinds), len(dtypes), figsize=(4 * len(dtypes), 2.7 * len(kinds)), layout="constrained", squeeze=False
    )
    for (row, (phase, scale)), (column, dtype) in product(enumerate(kinds), enumerate(dtypes)):
        axes = panels[row][column]
        for number, names in enumerate(curves.values()):
            points = [
                (found.length, found.mean)
                for found in deviations
                if (found.kernel, found.dtype, found.phase, found.scale) == (names[0], dtype, phase, scale)
            ]
            style = "os^v<>Dx+*"[number % 10] + "-"
            axes.plot(*zip(*points, strict=True), style, label=", ".join(names), markersize=4, linewidth=1)
        axes.set(title=f"{dtype}, {phase}, scale {scale:g}", xscale="log", yscale="log")
        axes.set(xlabel="tokens" if row == len(kinds) - 1 else "", ylabel="" if column else "mean deviation")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
