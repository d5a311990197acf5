from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from vattention.bench.memory import sections
from vattention.bench.memory.scenarios import SCENARIOS, SHARING
from vattention.cli.main import USER_ERROR, main


def test_every_manager_is_in_the_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "WIDTHS", (2,))
    out = tmp_path / "out.json"
    arguments = ["--scale", "0.01", "--only", "usage", "--only", "pages", "--only", "sharing", "--json", str(out)]
    assert main(["bench", "memory", *arguments]) == 0
    shown = capsys.readouterr().out
    figures = json.loads(out.read_text())
    rows = figures["tables"]["usage"]["rows"]
    assert {(row["scenario"], row["variant"]) for row in rows} == {
        (scenario.name, variant.name) for scenario in SCENARIOS for variant in scenario.variants
    }
    assert [row for row in rows if not 0 < row["live_share"] <= 1] == []
    for key in ("parallel", "beams"):
        saved = [row["variant"] for row in figures["tables"][key]["rows"]]
        assert saved == [variant.name for _, variants in SHARING for variant in variants]
    assert all(f"| {row['scenario']} | {row['variant']} |" in shown for row in rows)
    assert set(figures["tables"]) == {"usage", "pages", "blocks", "worst", "parallel", "beams"}
    assert figures["settings"] == {"model": "demo", "seed": 0, "scale": 0.01}
    assert {"vattention", "torch"} <= figures["versions"].keys()
    parts = "--only usage --only pages --only sharing"
    assert figures["command"] == f"vattention bench memory demo {parts} --scale 0.01 --seed 0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only", "everything"], "usage, pages"), (["--scale", "0"], "above 0"), (["--plot", "x"], "matplotlib")],
)
def test_wrong_options_are_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "memory", *arguments]) == USER_ERROR
    assert message in capsys.readouterr().err
