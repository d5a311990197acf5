"""What kernels of others need: packages that may not be there, and the limits of FlashAttention's kernels."""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from vattention.core import AttentionSpec
from vattention.kv.manager import CacheView

_log = logging.getLogger(__name__)

HALVES = (torch.float16, torch.bfloat16)

_AMPERE = (8, 0)


@lru_cache(maxsize=16)
def installed(name: str) -> Any:
    """The module called `name`, or None where it is not installed, or cannot be imported, which is logged: one that
    was compiled for another torch need not keep other kernels from running.
    """
    if find_spec(name) is None:
        return None
    try:
        return import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        _log.warning("%s is installed, and cannot be imported: %s", name, error)
        return None


def unsupported_device(view: CacheView, runs_on: str) -> str | None:
    """Why FlashAttention's kernels, whoever ships them, cannot run where the cache is.

    Args:
        runs_on: the type of device they are for.
    """
    device = view.keys.device
    if device.type != runs_on:
        return f"it runs on {runs_on}, and this KV cache is on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _AMPERE:
        return f"it needs an Ampere GPU or a later one, and {device} is older"
    return None


def unsupported_layer(spec: AttentionSpec, view: CacheView) -> str | None:
    """Why FlashAttention's kernels cannot compute such a layer: what FlashAttention-2, 3 and FlashInfer share."""
    if view.keys.dtype not in HALVES:
        return f"it takes float16 and bfloat16, not {str(view.keys.dtype).removeprefix('torch.')}"
    if spec.key_dim != spec.value_dim:
        return f"it takes keys and values of one size, not of {spec.key_dim} and {spec.value_dim} numbers"
    if spec.key_dim % 8 or spec.key_dim > 256:
        return f"it takes heads of a multiple of 8 numbers, at most 256, not {spec.key_dim}"
    if spec.has_sinks:
        return "it has no attention sinks"
    return None
