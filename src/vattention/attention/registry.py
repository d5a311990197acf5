"""Attention kernels by name, and the choice among them."""

from __future__ import annotations

from types import MappingProxyType

import torch

from vattention.attention.eager import EagerKernel
from vattention.attention.kernel import AttentionKernel
from vattention.attention.sdpa import SdpaKernel
from vattention.core import AttentionSpec
from vattention.errors import ConfigError

AUTO = "auto"
"""Not a kernel: take the fastest that can."""

KERNELS: MappingProxyType[str, AttentionKernel] = MappingProxyType(
    {kernel.name: kernel for kernel in (SdpaKernel(), EagerKernel())}
)
"""All kernels, the fastest first."""


def choose(name: str, spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> AttentionKernel:
    """The kernel called `name`, or with "auto" the fastest that computes such a layer.

    Raises:
        ConfigError: there is no such kernel, or it cannot compute the layer; the message names those that can.
    """
    reasons = {known: kernel.unsupported(spec, dtype, device) for known, kernel in KERNELS.items()}
    able = [known for known, reason in reasons.items() if reason is None]
    wanted = able[0] if name == AUTO and able else name
    if wanted in able:
        return KERNELS[wanted]
    if name == AUTO:
        said = "; ".join(f"{known}: {reason}" for known, reason in reasons.items())
        raise ConfigError(f"no attention kernel can compute this model's layers: {said}")
    if name not in KERNELS:
        raise ConfigError(f"attention={name!r} is not known; choose {', '.join(map(repr, [AUTO, *KERNELS]))}")
    raise ConfigError(
        f"attention={name!r} cannot compute this model's layers: {reasons[name]}; "
        f"choose {', '.join(map(repr, [AUTO, *able]))}"
    )
