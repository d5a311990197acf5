"""One fixture for all tests that every driver must pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.memory.backends import BACKENDS, Backend, opened


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with ExitStack() as undo:
        yield opened(request.param, undo)
