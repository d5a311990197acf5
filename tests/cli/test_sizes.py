from __future__ import annotations

import pytest

from vattention.cli.sizes import size


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (4096, "4 KiB"), (3 * 2**29, "1.5 GiB"), (3000 * 2**40, "3,000 TiB")],
)
def test_sizes(nbytes: int, text: str) -> None:
    assert size(nbytes) == text
