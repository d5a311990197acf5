"""What to tell the kernel about mappings of host memory, and what this kernel knows."""

from __future__ import annotations

from pathlib import Path

from vattention.memory import libc


def advice_for(page_nbytes: int, root: Path = Path("/")) -> tuple[int, ...]:
    """`madvise` values for every mapping of pages of this size.

    A forked child that wrote to shared memory would reach its parent, so it does not get any. Huge pages come just
    where the page size asks for them, so that a small page never costs 2 MiB; each call costs 2 to 4 µs for each
    shared page, so there is none where the system's setting says the same.

    Args:
        root: where `sys` is found.
    """
    settings = root / "sys/kernel/mm/transparent_hugepage"
    size, enabled = settings / "hpage_pmd_size", settings / "shmem_enabled"
    if not (size.exists() and enabled.exists()):
        return (libc.MADV_DONTFORK,)
    # Such as "always within_size [advise] never deny force".
    mode = enabled.read_text().partition("[")[2].partition("]")[0]
    if page_nbytes % int(size.read_text()) == 0:
        about_size = {libc.MADV_HUGEPAGE} if mode in ("advise", "within_size") else set()
    else:
        about_size = {libc.MADV_NOHUGEPAGE} if mode in ("always", "within_size") else set()
    return (libc.MADV_DONTFORK, *about_size)


def knows_populate() -> bool:
    """Whether the kernel has MADV_POPULATE_WRITE (Linux 5.14): advice it does not know is an error."""
    try:
        libc.madvise(0, 0, libc.MADV_POPULATE_WRITE)
    except OSError:
        return False
    return True
