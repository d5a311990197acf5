from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from vattention.cli.main import main


def test_writes_a_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "numerics.json"
    assert main(["numerics", "--length", "20", "--scale", "1", "--json", str(path)]) == 0
    assert "float16, prefill, inputs of scale 1" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert {d["length"] for d in written["deviations"]} == {20}
    assert written["settings"]["seed"] == 0


def test_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "numerics.svg"
    assert main(["numerics", "--length", "4", "--length", "20", "--scale", "1", "--plot", str(path)]) == 0
    assert "bfloat16, decode" in path.read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--length", "0"], "at least 1"), (["--scale", "0"], "above 0"), (["--json", "/no/file"], "cannot write")],
)
def test_wrong_options(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["numerics", *options]) == 2
    assert said in capsys.readouterr().err


def test_plots_need_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["numerics", "--plot", str(tmp_path / "out.svg")]) == 2
    assert "vattention[plots]" in capsys.readouterr().err
    assert not (tmp_path / "out.svg").exists()
