"""The GPU benchmark's code, tried on a processor."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import report, steps
from benchmarks.gpu.apart import measure_apart
from benchmarks.gpu.machine import Chart, Machine, Table
from tests.model.fake_graphs import DeviceKernel, FakeCapture
from vattention.attention import registry
from vattention.kv.manager import LayerView


def test_every_part_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--tiny", "--here", "--json", str(report)])
    parts = json.loads(report.read_text())["parts"]
    assert list(parts) == list(gpu.PARTS)
    printed = capsys.readouterr().out
    for name, part in parts.items():
        assert "failed" not in part, part["failed"]
        assert part["rows"], name
        assert f"### {part['title']}" in printed
        assert not any(row.get("failed") for row in part["rows"])


def test_steps_by_graphs_are_measured_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = FakeCapture()
    kernel = DeviceKernel(LayerView, graphs.opaque)
    monkeypatch.setattr(registry, "KERNELS", MappingProxyType({"device": kernel} | dict(registry.KERNELS)))
    monkeypatch.setattr(Machine, "capture", lambda machine: graphs)
    table = steps.decode(Machine("cpu", tiny=True))
    assert graphs.num_replays == 4 * (1 + 1) * steps.NUM_STEPS
    for row in table.rows:
        assert row["graphs"] == 3
        assert row["without ÷ with"] == pytest.approx(row["without graphs, ms"] / row["step, ms"])  # type: ignore[operator]


def fails(machine: Machine) -> Table:
    raise ValueError("not today")


def works(machine: Machine) -> Table:
    return Table("An aim", [{"figure": 1.5, "more": {"a": 1}}])


def test_a_failed_part_is_done_again_and_the_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "gpu.json"
    call = ["--device", "cpu", "--tiny", "--here", "--json", str(report)]
    monkeypatch.setattr(gpu, "PARTS", {"first": works, "second": fails, "third": works})
    gpu.main(call)
    captured = capsys.readouterr()
    assert "not today" in captured.out
    assert "Traceback" in captured.err
    found = json.loads(report.read_text())["parts"]
    assert "not today" in found["second"]["failed"]
    assert found["first"]["rows"] == [{"figure": 1.5, "more": {"a": 1}}]
    assert "third" not in found
    monkeypatch.setattr(gpu, "PARTS", {"first": fails, "second": works, "third": works})
    gpu.main(call)
    found = json.loads(report.read_text())["parts"]
    assert all("failed" not in part for part in found.values())
    gpu.main([*call, "--only", "first"])
    assert "failed" in json.loads(report.read_text())["parts"]["first"]


def test_parts_run_in_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--tiny", "--only", "ceilings", "--json", str(report)])
    assert json.loads(report.read_text())["parts"]["ceilings"]["rows"]
    assert "Ceilings" in capfd.readouterr().out


BREAKS = """
import json, os, sys, time
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.machine import Table
from tests.benchmarks.test_gpu import fails, works

gpu.MOST_SECONDS = 0.2
gpu.PARTS = {
    "one": works, "two": lambda machine: os._exit(7), "three": works, "four": fails,
    "five": lambda machine: time.sleep(60), "six": works,
}
gpu.main(["--device", "cpu", "--tiny", "--here", "--json", *sys.argv[1:]])
"""


def test_a_part_that_ends_its_process_or_hangs_costs_no_other(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "gpu.json"
    names = ("one", "two", "three", "four", "five", "six")
    measure_apart([sys.executable, "-c", BREAKS, str(report)], names, report, 100)
    parts = json.loads(report.read_text())["parts"]
    assert [name for name in names if "rows" in parts[name]] == ["one", "three", "six"]
    assert parts["two"]["failed"] == parts["five"]["failed"] == "its process ended"
    assert "not today" in parts["four"]["failed"]
    assert "most recent call first" in capfd.readouterr().err


def test_a_process_that_begins_nothing_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="began none of one, two, and ended with 3"):
        measure_apart([sys.executable, "-c", "raise SystemExit(3)"], ("one", "two"), tmp_path / "gpu.json", 100)


def test_no_part_is_begun_too_late(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "PARTS", {"first": works})
    gpu.main(["--device", "cpu", "--tiny", "--here", "--seconds", "0"])
    assert capsys.readouterr().out == "first: left for another run, 0 s are over\n"


def test_the_report_has_every_table_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source, folder = tmp_path / "gpu.json", tmp_path / "docs"
    lines: list[dict[str, object]] = [{"n": 2**i, "rate": 1.5, "kind": kind} for i in range(3) for kind in "ab"]
    bars: list[dict[str, object]] = [{"n": name, "rate": 2.0, "all": {"x": 1}} for name in ("slots", "blocks")]
    tables = {
        "lines": Table("Faster", lines, Chart("n", "rate", ("kind",), 1.0)),
        "bars": Table("Larger", bars, Chart("n", "rate")),
        "plain": Table("Bare", bars),
    }
    parts: dict[str, object] = {name: asdict(table) for name, table in tables.items()}
    parts["broken"] = {"failed": "ValueError('not today')"}
    source.write_text(json.dumps({"date": "2026-11-22", "environment": {"torch": "2.11"}, "parts": parts}))
    report.main([str(source), str(folder)])
    page = (folder / "gpu.md").read_text()
    for expected in (
        "2026-11-22",
        "torch 2.11",
        "### Faster",
        "### Larger",
        "### Bare",
        "not today",
        "(gpu-bars.svg)",
    ):
        assert expected in page
    assert {path.name for path in folder.iterdir()} == {"gpu.md", "gpu-lines.svg", "gpu-bars.svg"}
    assert "kind a" in (folder / "gpu-lines.svg").read_text()
    with pytest.raises(SystemExit, match="nothing in"):
        report.main([str(tmp_path / "none.json"), str(folder)])


def test_a_table_shows_figures() -> None:
    rows: list[dict[str, object]] = [
        {"name": "a", "rate": 12345.6, "share": 0.12345, "all": {"x": 1}, "none": None}
    ]
    lines = Table("An aim", rows).markdown().splitlines()
    assert lines[0] == "### An aim"
    assert lines[2] == "| name | rate | share | none |"
    assert lines[4] == "| a | 12,346 | 0.123 |  |"
    assert "nothing was measured" in Table("An aim", []).markdown()
