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
    mpl.rcParams["svg.fonttype"] = "none"  # small files
    from matplotlib import pyplot

    return pyplot


def _usage(pyplot: Any, rows: list[dict[str, Any]], title: str) -> Any:
    """A panel for each load: what a manager holds is a bar, what running sequences need of it a line across."""
    loads = list(dict.fromkeys(r["scenario"] for r in rows))
    figure, panels = pyplot.subplots(
        -(-len(loads) // 2), 2, figsize=(11, 1.9 * -(-len(loads) // 2) + 0.6), layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(loads) :]:
        axes.remove()
    for axes, load in zip(panels.flat, loads, strict=False):
        chosen = [r for r in rows if r["scenario"] == load][::-1]
        places = range(len(chosen))
        axes.barh(places, [100 * r["held_share"] for r in chosen], 0.7, color=REST, label="of mapped memory")
        live = [100 * r["live_share"] for r in chosen]
        axes.plot(live, places, "|", color=OURS, markersize=12, markeredgewidth=2, label="of live memory")
        papers = [100 * (r["paper_share"] or float("nan")) for r in chosen]
        axes.plot(papers, places, "D", color=THEIRS, markersize=5, label="of KV memory, PagedAttention's paper")
        axes.set_yticks(places, [r["variant"] for r in chosen], fontsize=8)
        axes.set_title(load, fontsize=9)
        axes.set(xlim=(0, 101))
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title.partition(',')[0]}, per cent", fontsize=11)
    _legend_below(figure)
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
    """A panel for each load: managers side by side, and the paper."""
    loads = list(dict.fromkeys(r["dataset"] for r in rows))
    widths = [int(key.removeprefix("saved_")) for key in rows[0] if key.startswith("saved_")]
    figure, panels = pyplot.subplots(
        1, len(loads), figsize=(3.6 * len(loads), 3.4), layout="constrained", sharey=True, squeeze=False
    )
    for axes, load in zip(panels.flat, loads, strict=True):
        chosen = [r for r in rows if r["dataset"] == load]
        bars = [(r["variant"].split(",")[0], r, "saved") for r in chosen]
        bars += [("paper", r, "paper") for r in chosen if r[f"paper_{widths[0]}"] is not None]
        for index, ((name, row, kind), colour) in enumerate(zip(bars, (OURS, REST, THEIRS), strict=False)):
            places = [i + (index - (len(bars) - 1) / 2) * 0.8 / len(bars) for i in range(len(widths))]
            heights = [100 * (row[f"{kind}_{width}"] or 0) for width in widths]
            axes.bar(places, heights, 0.8 / len(bars), color=colour, label=name)
        axes.set_xticks(range(len(widths)), [str(width) for width in widths])
        axes.set_title(load, fontsize=9)
        axes.set(xlabel="sequences per request")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set(ylabel="per cent of memory saved")
    figure.suptitle(title, fontsize=11)
    _legend_below(figure)
    return figure


def _legend_below(figure: Any) -> None:
    """One legend for all panels, of which the first has everything."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)


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
