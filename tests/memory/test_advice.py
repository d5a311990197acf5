"""What the kernel is told about mappings, under every setting of a system."""

from __future__ import annotations

from pathlib import Path

import pytest

from vattention.memory import libc
from vattention.memory.advice import advice_for, knows_populate

MODES = ("always", "within_size", "advise", "never", "deny", "force")
KIB = 2**10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("page_nbytes", [4 * KIB, 64 * KIB, 2048 * KIB, 6144 * KIB])
def test_huge_pages_come_just_where_the_page_size_asks_for_them(
    tmp_path: Path, mode: str, page_nbytes: int
) -> None:
    settings = tmp_path / "sys/kernel/mm/transparent_hugepage"
    settings.mkdir(parents=True)
    (settings / "hpage_pmd_size").write_text(f"{2048 * KIB}\n")
    (settings / "shmem_enabled").write_text(" ".join(f"[{m}]" if m == mode else m for m in MODES) + "\n")
    advice = advice_for(page_nbytes, tmp_path)
    assert libc.MADV_DONTFORK in advice
    small = page_nbytes < 2048 * KIB
    assert (libc.MADV_NOHUGEPAGE in advice) == (small and mode in ("always", "within_size"))
    assert (libc.MADV_HUGEPAGE in advice) == (not small and mode in ("advise", "within_size"))


def test_kernels_without_huge_pages(tmp_path: Path) -> None:
    assert advice_for(4 * KIB, tmp_path) == (libc.MADV_DONTFORK,)


@pytest.mark.parametrize("known", [True, False])
def test_old_kernels_are_recognised(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    def madvise(address: int, nbytes: int, advice: int) -> None:
        if advice == libc.MADV_POPULATE_WRITE and not known:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(libc, "madvise", madvise)
    assert knows_populate() == known
