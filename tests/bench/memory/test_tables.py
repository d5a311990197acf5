from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vattention.bench.memory import plots
from vattention.bench.memory.tables import Column, Table, Value, count, hundredths, percent, tenths
from vattention.errors import ConfigError

TABLE = Table(
    "t",
    "Title",
    (Column("name", "who"), Column("share", "how much", percent), Column("n", "how many", count)),
    [("one", 0.12345, 12345), ("two", None, None)],
    note="A note.",
)


def test_a_table_for_people() -> None:
    assert TABLE.markdown().split("\n") == [
        "### Title",
        "",
        "| who | how much | how many |",
        "| --- | ---: | ---: |",
        "| one | 12.3 % | 12,345 |",
        "| two |  |  |",
        "",
        "A note.",
        "",
    ]


def test_a_table_for_programs() -> None:
    assert TABLE.to_json()[0] == {"name": "one", "share": 0.12345, "n": 12345}


def test_numbers_as_people_read_them() -> None:
    assert (tenths(1234.56), hundredths(2), tenths(None)) == ("1,234.6", "2.00", "")


def test_plots_without_matplotlib_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"vattention\[plots\]"):
        plots.load()


def test_every_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    def table(key: str, *rows: dict[str, Value]) -> Table:
        return Table(key, key, [Column(name, name) for name in rows[0]], [tuple(row.values()) for row in rows])

    shares: dict[str, Value] = {"live_share": 0.9, "held_share": 0.8, "paper_share": 0.5}
    load: dict[str, Value] = {"scenario": "load, 2", "variant": "a", **shares}
    page: dict[str, Value] = {"page_kib": 4, "layout": "sliced", "share_A": 0.9, "share_B": 0.8}
    saved: dict[str, Value] = {"dataset": "d", "variant": "a", "saved_2": 0.3, "paper_2": 0.2}
    tables = {
        "usage": table("usage", load, load | {"paper_share": None}),
        "pages": table("pages", page, page | {"layout": "per-layer"}),
        "parallel": table("parallel", saved, saved | {"paper_2": None}),
        "beams": table("beams", saved),
        "other": table("other", {"x": "no picture"}),
    }
    paths = plots.draw(tables, tmp_path / "new")
    assert {path.name for path in paths} == {f"memory-{key}.svg" for key in plots.PICTURES}
    assert all("<svg" in path.read_text() for path in paths)
