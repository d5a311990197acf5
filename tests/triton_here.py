"""Whether Triton's kernels can be tried here: on a GPU, or by its interpreter where there is none."""

from __future__ import annotations

import os
from importlib.metadata import version
from importlib.util import find_spec

import torch
from numpy.lib import NumpyVersion

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = find_spec("triton") is not None

if not HAS_GPU:
    # Read by Triton when the kernels are imported, which nothing but tests does without a GPU.
    os.environ["TRITON_INTERPRET"] = "1"


def _runs_triton() -> bool:
    # The interpreter of 3.6 makes numbers of arrays of one, which NumPy 2.4 refuses; that of 3.9 does not.
    return HAS_GPU or NumpyVersion(version("triton")) >= "3.9.0"


RUNS_TRITON = HAS_TRITON and _runs_triton()
"""Whether kernels with loops that end where a tensor says run here, on a GPU or by the interpreter."""
