"""Whether Triton's kernels can be tried here: on a GPU, or by its interpreter where there is none."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = find_spec("triton") is not None

if not HAS_GPU:
    # Read by Triton when the kernels are imported, which nothing but tests does without a GPU.
    os.environ["TRITON_INTERPRET"] = "1"
