"""The tables as pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vattention.bench.memory.tables import Table
from vattention.errors import ConfigError

OURS, THEIRS, REST = "#1f4e8c", "#c98a2b", "#7aa6d8"


def draw(tables: Mapping[str, Table], folder: Path) -> list[Path]:
    """Write an SVG for each table there is a picture for; returns their paths.

    Raises:
        ConfigError: matplotlib is not installed, or the folder cannot be written.
    """
    pyplot = load()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write plots to {folder}: {error.strerror}") from error
    paths = []
    for key, picture in PICTURES.items():
        if key not in tables or not tables[key].rows:
            continue
        figure = picture(pyplot, tables[key].to_json(), tables[key].title)
        paths.append(folder / f"memory-{key}.svg")
        figure.savefig(paths[-1], metadata={"Date": None})
        pyplot.close(figure)
    return paths


def load() -> Any:
    """matplotlib's pyplot, for files.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib; install it with: pip install 'vattention[plots]'") from error
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "vattention"  # the same file for the same figures
    from matplotlib import pyplot

    return pyplot


def _usage(pyplot: Any, rows: list[dict[str, Any]], title: str) -> Any:
    figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.32 * len(rows)), layout="constrained")
    places = list(range(len(rows)))[::-1]
    axes.barh(places, [100 * r["live_share"] for r in rows], color=OURS, label="in live memory")
    known = [(p, 100 * r["paper_share"]) for p, r in zip(places, rows, strict=True) if r["paper_share"]]
    if known:
        axes.scatter(*reversed(tuple(zip(*known, strict=True))), color=THEIRS, zorder=3, label="paper")
    axes.set_yticks(places, [f"{r['variant']}\n{r['scenario'].rsplit(',', 1)[0]}" for r in rows], fontsize=7)
    axes.set(xlabel="per cent that holds tokens", xlim=(0, 100), title=title)
    _finish(figure)
    return figure


def _pages(pyplot: Any, rows: list[dict[str, Any]], title: str) -> Any:
    figure, axes = pyplot.subplots(figsize=(8, 3.8), layout="constrained")
    models = [key.removeprefix("share_") for key in rows[0] if key.startswith("share_")]
    for model, colour in zip(models, (OURS, THEIRS, REST), strict=False):
        for layout, style in (("sliced", "-"), ("per-layer", "--")):
            chosen = [r for r in rows if r["layout"] == layout]
            axes.plot(
                [r["page_kib"] for r in chosen],
                [100 * r[f"share_{model}"] for r in chosen],
                style,
                color=colour,
                marker="o",
                markersize=3,
                label=f"{model}, {layout}",
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks([r["page_kib"] for r in rows], [f"{r['page_kib']:,}" for r in rows])
    axes.set(xlabel="page size, KiB", ylabel="per cent that holds tokens", ylim=(0, 102), title=title)
    _finish(figure)
    return figure


def _saved(pyplot: Any, rows: list[dict[str, Any]], title: str) -> Any:
    figure, axes = pyplot.subplots(figsize=(8, 3.8), layout="constrained")
    widths = [int(key.removeprefix("saved_")) for key in rows[0] if key.startswith("saved_")]
    bars = [(f"{r['dataset']}: {r['variant']}", r, "saved") for r in rows]
    bars += [(f"{r['dataset']}: paper", r, "paper") for r in rows if r[f"paper_{widths[0]}"] is not None]
    for index, (label, row, kind) in enumerate(bars):
        shift = (index - (len(bars) - 1) / 2) * 0.8 / len(bars)
        heights = [100 * (row[f"{kind}_{width}"] or 0) for width in widths]
        colour = {"label": label} | ({"color": THEIRS, "hatch": "//"} if kind == "paper" else {})
        axes.bar([i + shift for i in range(len(widths))], heights, 0.8 / len(bars), **colour)
    axes.set_xticks(range(len(widths)), [str(width) for width in widths])
    axes.set(xlabel="sequences per request", ylabel="per cent of memory saved", title=title)
    _finish(figure)
    return figure


def _finish(figure: Any) -> None:
    axes = figure.axes[0]
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


PICTURES: dict[str, Callable[[Any, list[dict[str, Any]], str], Any]] = {
    "usage": _usage,
    "pages": _pages,
    "parallel": _saved,
    "beams": _saved,
}
"""How each table is drawn, by its key."""
