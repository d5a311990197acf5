"""Whether fused modules, or torch.compile, pay in a decode step: where a layer is many short kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.machine import Chart, Machine, Table
from benchmarks.gpu.models import LLAMA, QWEN, RandomModel, configured, random_model, served
from benchmarks.gpu.steps import step_seconds
from vattention.model.optimize import optimize


def fusing(machine: Machine) -> Table:
    """Models as they come; with norms and feed-forward blocks compiled; with what `optimize` makes of them."""
    batches, context = ((1, 4), 64) if machine.tiny else ((1, 8, 32), 1024)
    rows: list[dict[str, object]] = []
    for shape in (QWEN, LLAMA):
        model = random_model(shape, machine, optimized=False)
        config = configured(machine, max_num_seqs=max(batches))
        times: dict[str, dict[int, float]] = {}
        elapsed: dict[str, float] = {}
        for name, prepare in PREPARED.items():
            undo = prepare(machine, model)
            began = time.perf_counter()
            with served(machine, model, config, context + 64) as running:
                times[name] = {batch: step_seconds(machine, running, batch, context) for batch in batches}
            elapsed[name] = time.perf_counter() - began
            undo()
        rows += [
            {
                "model": shape,
                "batch": batch,
                **{f"{name}, ms": times[name][batch] * 1e3 for name in PREPARED},
                "plain ÷ fused": times["plain"][batch] / times["fused"][batch],
                "compiled ÷ fused": times["compiled"][batch] / times["fused"][batch],
                "compiled, s in all": elapsed["compiled"],
            }
            for batch in batches
        ]
        del model, running
    return Table(
        "Norms, gates and rotary embeddings: fused modules at least 1.0 times as fast as torch.compile",
        rows,
        Chart("batch", "plain ÷ fused", ("model",), 1.0),
    )


def compile_parts(model: nn.Module, backend: str) -> Callable[[], None]:
    """Compile the norms and feed-forward blocks of a model of Llama's kind, each kind of module once.

    Returns:
        Undoes it.
    """
    functions: dict[type[nn.Module], Callable[..., Any]] = {}
    compiled = [module for name, module in model.named_modules() if name.endswith(("norm", "mlp"))]
    for module in compiled:
        kind = type(module)
        if kind not in functions:
            functions[kind] = torch.compile(kind.forward, dynamic=True, backend=backend)
        module.forward = MethodType(functions[kind], module)

    def undo() -> None:
        for module in compiled:
            del module.forward

    return undo


def _plain(machine: Machine, random: RandomModel) -> Callable[[], None]:
    return lambda: None


def _compiled(machine: Machine, random: RandomModel) -> Callable[[], None]:
    # A backend that compiles takes minutes on a processor; there it is tried without.
    return compile_parts(random.model, "inductor" if machine.is_gpu else "eager")


def _fused(machine: Machine, random: RandomModel) -> Callable[[], None]:
    optimize(random.model)
    return lambda: None


PREPARED: dict[str, Callable[[Machine, RandomModel], Callable[[], None]]] = {
    "plain": _plain,
    "compiled": _compiled,
    "fused": _fused,
}
"""The last cannot be undone."""
