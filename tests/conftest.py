"""What the tests of several rooms share."""

from __future__ import annotations

# First: Triton looks at it when it is imported, as it is by transformers.
import tests.triton_here  # noqa: F401

# isort: split

import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from vattention import native


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> Iterator[None]:
    """Ctrl-C as Python has it: a shell's background jobs begin with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def kernels_of_lanes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds the compiled kernels for vectors of at most so many float32, and no instructions beyond those, or with
    1 as second argument those that multiply pairs of bfloat16.
    """

    @cache
    def build(lanes: int, dot: int = 0) -> Path:
        library = tmp_path_factory.mktemp(f"lanes{lanes}_{dot}") / f"_kernels{EXTENSION_SUFFIXES[0]}"
        flags = [f"-DVATTENTION_LANES={lanes}", f"-DVATTENTION_DOT={dot}", "-O1", "-fPIC", "-shared"]
        warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
        sources = sorted(Path(native.__file__).parent.glob("*.c"))
        subprocess.run(["cc", *flags, *warnings, *sources, "-o", library, "-lm"], check=True, timeout=200)
        return library

    return build
