"""`vattention numerics`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vattention.cli.files import open_output
from vattention.errors import ConfigError


def numerics(
    *,
    length: Annotated[Sequence[int], Parameter(negative=())] = (),
    scale: Annotated[Sequence[float], Parameter(negative=())] = (),
    seed: int = 0,
    output: Annotated[Path | None, Parameter(name="--json")] = None,
    plot: Path | None = None,
) -> None:
    """Measure how exact this machine's attention kernels are, against float64.

    Every kernel on contiguous slots and on blocks, in every type, as "Is Flash Attention Stable?" (arXiv
    2405.02803) measures: the largest and the mean deviation.

    Args:
        length: tokens to attend to; give it again for more of them.
        scale: standard deviation of queries and keys; give it again for more of them.
        seed: of the inputs.
        output: write the figures to this file too, as JSON.
        plot: draw mean deviations over lengths into this SVG file; needs matplotlib.
    """
    from vattention.bench import numerics as bench
    from vattention.bench.memory import plots

    if any(tokens < 1 for tokens in length):
        raise ConfigError(f"--length must be at least 1, not {min(length)}")
    if any(spread <= 0 for spread in scale):
        raise ConfigError(f"--scale must be above 0, not {min(scale):g}")
    if plot is not None:
        plots.load()
        open_output(plot).close()
    settings = bench.Settings(tuple(length) or bench.LENGTHS, tuple(scale) or bench.SCALES, seed)
    deviations = []
    with nullcontext() if output is None else open_output(output) as sink:
        for found in bench.measure(settings):
            print(bench.table(found), flush=True)
            deviations += found
        if sink is not None:
            json.dump(bench.to_json(settings, deviations), sink, indent=2)
            sink.write("\n")
    if plot is not None:
        bench.draw(deviations, plot)
