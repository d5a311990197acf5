"""Makes a loaded model fast on this machine without touching its code: modules are replaced, each one verified."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from vattention.model.linear import LinearMethod, PackedLinear, TorchLinear, fastest_method

_log = logging.getLogger(__name__)

TOLERANCE = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 1e-5}
"""Largest difference from the replaced module's result, as a share of that result's largest number.

Two units in the last place of bfloat16 and float16; in float32 what another order of summation makes.
"""

_VERIFIED_ROWS = (1, 5, 64)
_VERIFIED_OUTPUTS = 512
_PROGRESS_DELAY_S = 2.0


@dataclass(frozen=True, slots=True)
class OptimizeReport:
    """What `optimize` did.

    Attributes:
        replaced: how many linear layers now run by each method, by its name.
        kept: linear layers that stay as they were because nothing here is faster.
        refused: names of layers whose replacement gave other results; they stay as they were.
        copied_nbytes: memory that lasts beyond the model's own: packed weights whose original others share.
        peak_copied_nbytes: the most there was at any time, with the originals about to be dropped.
        elapsed_s: time it took.
    """

    replaced: dict[str, int]
    kept: int
    refused: tuple[str, ...]
    copied_nbytes: int
    peak_copied_nbytes: int
    elapsed_s: float


@torch.no_grad()
def optimize(model: nn.Module) -> OptimizeReport:
    """Replaces, in place, the linear layers of a model in processor memory that run faster by another method.

    A layer's weight is dropped once its packed form is there, unless other modules share it, as embeddings tied
    to the output layer do. Only plain `nn.Linear` modules without hooks are replaced. The model serves inference
    only afterwards: the replacements have no gradients and are not part of its state dict.
    """
    begin = time.perf_counter()
    holders = Counter(id(tensor) for module in model.modules() for tensor in module.parameters(recurse=False))
    methods: dict[tuple[int, int, torch.dtype], type[LinearMethod]] = {}
    replaced: Counter[str] = Counter()
    refused = []
    kept = copied = peak = 0
    layers = _linear_layers(model)
    for layer in tqdm(layers, "packing weights", unit="layer", delay=_PROGRESS_DELAY_S, leave=False):
        linear = layer.linear
        shape = (linear.out_features, linear.in_features, linear.weight.dtype)
        if shape not in methods:
            methods[shape] = fastest_method(*shape)
        if methods[shape] is TorchLinear:
            kept += 1
            continue
        replacement = PackedLinear.of(linear, methods[shape])
        peak = max(peak, copied + replacement.method.nbytes)
        difference = largest_difference(replacement, linear)
        # Written so that NaN counts as a difference.
        if not difference <= TOLERANCE[linear.weight.dtype]:
            name = layer.sites[0].name
            _log.warning("%s stays as it is: method %s is off by %.2g", name, methods[shape].name, difference)
            refused.append(name)
            continue
        for site in layer.sites:
            setattr(site.parent, site.attribute, replacement)
        replaced[methods[shape].name] += 1
        if holders[id(linear.weight)] > 1:
            copied += replacement.method.nbytes
    return OptimizeReport(dict(replaced), kept, tuple(refused), copied, peak, time.perf_counter() - begin)


@dataclass(frozen=True, slots=True)
class _Site:
    """Where a module hangs in the model."""

    parent: nn.Module
    attribute: str
    name: str


@dataclass(frozen=True, slots=True)
class _Layer:
    """A linear module, and all the places it is used at."""

    linear: nn.Linear
    sites: list[_Site]


def _linear_layers(model: nn.Module) -> list[_Layer]:
    layers: dict[nn.Module, _Layer] = {}
    for prefix, parent in model.named_modules():
        for attribute, child in parent.named_children():
            if _replaceable(child):
                layer = layers.setdefault(child, _Layer(child, []))
                layer.sites.append(_Site(parent, attribute, f"{prefix}.{attribute}" if prefix else attribute))
    return list(layers.values())


def _replaceable(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Subclasses and hooks may do more than multiply; other devices have fast kernels of their own."""
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and module.weight.device.type == "cpu"
        and module.weight.dtype in TOLERANCE
        and module.weight.numel() > 0
    )


def largest_difference(replacement: PackedLinear, linear: nn.Linear) -> float:
    """Compares results for random inputs of 1, 5 and 64 rows, as a share of the largest number in them.

    One row is compared over all outputs, more rows over the first, the last and random ones: an output layer
    over a whole vocabulary would take seconds by the old way.
    """
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randperm(linear.out_features, generator=generator)[:_VERIFIED_OUTPUTS]
    ends = torch.tensor([0, linear.out_features - 1])
    outputs = torch.cat((outputs, ends))
    bias = None if linear.bias is None else linear.bias[outputs]
    largest = 0.0
    for rows in _VERIFIED_ROWS:
        x = torch.randn(rows, linear.in_features, generator=generator).to(linear.weight.dtype)
        result: Tensor = replacement(x)
        if rows == 1:
            expected = linear(x)
        else:
            result, expected = result[:, outputs], F.linear(x, linear.weight[outputs], bias)
        scale = expected.float().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        difference = float((result.float() - expected.float()).abs().max() / scale)
        if not difference <= largest:
            largest = difference
    return largest
