"""Whether torch.compile pays in a decode step: for the parts of a layer that are many short kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.machine import Machine, Table
from benchmarks.gpu.models import LLAMA, QWEN, configured, random_model, served
from benchmarks.gpu.steps import step_seconds


def compiled(machine: Machine) -> Table:
    """Norms and feed-forward blocks, which know nothing of the cache; attention stays as it is."""
    batches, context = ((1, 4), 64) if machine.tiny else ((1, 8, 32, 128), 1024)
    rows: list[dict[str, object]] = []
    for shape in (QWEN, LLAMA):
        model = random_model(shape, machine)
        config = configured(machine, max_num_seqs=max(batches))
        times: dict[str, dict[int, float]] = {}
        elapsed = 0.0
        for name in ("plain", "compiled"):
            if name == "compiled":
                # A backend that compiles takes minutes on a processor; there it is tried without.
                compile_parts(model, "inductor" if machine.is_gpu else "eager")
            began = time.perf_counter()
            with served(machine, model, config, context + 64) as running:
                times[name] = {batch: step_seconds(machine, running, batch, context) for batch in batches}
            elapsed = time.perf_counter() - began
        rows += [
            {
                "model": shape,
                "batch": batch,
                "plain, ms": times["plain"][batch] * 1e3,
                "compiled, ms": times["compiled"][batch] * 1e3,
                "plain ÷ compiled": times["plain"][batch] / times["compiled"][batch],
                "with compiling, s": elapsed,
            }
            for batch in batches
        ]
        del model, running
    return Table("torch.compile of norms and feed-forward blocks: worth having from 1.05 on", rows)


def compile_parts(model: nn.Module, backend: str) -> None:
    """Compile the norms and feed-forward blocks of a model of Llama's kind, each kind of module once."""
    functions: dict[type[nn.Module], Callable[..., Any]] = {}
    for name, module in model.named_modules():
        if not name.endswith(("norm", "mlp")):
            continue
        kind = type(module)
        if kind not in functions:
            functions[kind] = torch.compile(kind.forward, dynamic=True, backend=backend)
        module.forward = MethodType(functions[kind], module)
