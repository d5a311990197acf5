from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import attention
from benchmarks.attention import Quartiles, Result, main, row, summary
from vattention import native

needs_kernels = pytest.mark.skipif(native.kernels() is None, reason="no compiled kernels here")


def result(*medians: float) -> Result:
    relative = {f"paged {size}": Quartiles(m, m - 0.1, m + 0.1) for size, m in zip((1, 16), medians, strict=True)}
    return Result("demo", 4, 1024, 8_000_000, 7, Quartiles(1e-3, 0.9e-3, 1.2e-3), relative)


@pytest.fixture
def threads() -> Iterator[None]:
    """`main` sets their number for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_kernels
@pytest.mark.usefixtures("threads")
def test_measures_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attention, "COPIES_NBYTES", 1)
    monkeypatch.setattr(attention, "MOST_NBYTES", 2 * 32 * 512 * 2)
    figures, table = tmp_path / "a.json", tmp_path / "a.md"
    cases = ["--shapes", "demo", "--batches", "1", "2", "4", "--contexts", "32", "--blocks", "1", "16"]
    main([*cases, "--threads", "1", "--seconds", "0", "--json", str(figures), "--markdown", str(table)])
    written = json.loads(figures.read_text())
    assert [case["batch"] for case in written["cases"]] == [1, 2]  # four sequences are too large
    for case in written["cases"]:
        assert list(case["relative"]) == ["sdpa", "paged 1", "paged 16"]
        assert case["num_turns"] == attention.LEAST_TURNS
        for spread in (case["native_s"], *case["relative"].values()):
            assert 0 < spread["lower"] <= spread["median"] <= spread["upper"]
    assert "--contexts 32 --blocks 1 16" in written["command"]
    assert table.read_text() == capsys.readouterr().out


def test_a_row_shows_median_and_quartiles() -> None:
    cells = [cell.strip() for cell in row(result(1.5, 1.25)).split("|")[1:-1]]
    shown = ["demo", "4", "1,024", "7", "1,000 (900 to 1,200)", "8.0"]
    assert cells == [*shown, "1.50 (1.40 to 1.60)", "1.25 (1.15 to 1.35)"]


def test_the_summary_is_over_cases() -> None:
    cells = summary([result(1.5, 1.0), result(3.0, 1.1), result(2.0, 1.3)]).split("|")[1:-1]
    assert cells[-2:] == [" 2.00 (1.50 to 3.00) ", " 1.10 (1.00 to 1.30) "]
    assert len(cells) == len(row(result(1, 1)).split("|")[1:-1])


def test_quartiles() -> None:
    assert Quartiles.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Quartiles(3.0, 2.0, 4.0)
