"""What was measured on a GPU as a page for people: every table, and a picture of each.

python -m benchmarks.gpu.report benchmarks/results/gpu.json docs   # docs/gpu.md, docs/gpu-*.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.apart import read
from benchmarks.gpu.machine import Table
from vattention.bench.memory.plots import load


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    report = read(options.json)
    if not report:
        raise SystemExit(f"there is nothing in {options.json}; measure with: python -m benchmarks.gpu --json FILE")
    options.folder.mkdir(parents=True, exist_ok=True)
    page = options.folder / "gpu.md"
    page.write_text(write(report, options.folder, options.json), encoding="utf-8")
    print(page)


def write(report: Mapping[str, Any], folder: Path, source: Path) -> str:
    """The page, whose pictures go to the folder."""
    surroundings = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    lines = [
        "# On a GPU",
        "",
        f"Measured on {report['date']} by `python -m benchmarks.gpu`; all figures are in `{source.name}`.",
        "",
        f"{surroundings}.",
        "",
    ]
    for name, part in report["parts"].items():
        if "rows" not in part:
            lines += [f"### {name}", "", f"Not measured: {part['failed']}", ""]
            continue
        lines.append(Table(part["title"], part["rows"]).markdown())
        if part.get("chart") and part["rows"]:
            picture = folder / f"gpu-{name}.svg"
            draw(part, picture)
            lines += [f"![{part['title']}]({picture.name})", ""]
    return "\n".join(lines)


def draw(part: Mapping[str, Any], path: Path) -> None:
    """The picture of one part's table."""
    chart, rows = part["chart"], part["rows"]
    pyplot = load()
    figure, axes = pyplot.subplots(figsize=(7, 3.4), layout="constrained")
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(", ".join(f"{name} {row[name]}" for name in chart["lines"]), []).append(row)
    if all(isinstance(row[chart["x"]], int | float) for row in rows):
        for label, points in lines.items():
            axes.plot([p[chart["x"]] for p in points], [p[chart["y"]] for p in points], marker="o", label=label)
        axes.set_xscale("log", base=2)
        ticks = sorted({row[chart["x"]] for row in rows})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
    else:
        names = list(dict.fromkeys(row[chart["x"]] for row in rows))
        width = 0.8 / len(lines)
        for index, (label, points) in enumerate(lines.items()):
            places = [names.index(p[chart["x"]]) + (index - (len(lines) - 1) / 2) * width for p in points]
            axes.bar(places, [p[chart["y"]] for p in points], width, label=label)
        axes.set_xticks(range(len(names)), names)
    if chart["aim"] is not None:
        axes.axhline(chart["aim"], color="black", linewidth=0.8, linestyle="--", label=f"aim: {chart['aim']}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(chart["x"])
    axes.set_ylabel(chart["y"])
    if any(lines) or chart["aim"] is not None:
        axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
