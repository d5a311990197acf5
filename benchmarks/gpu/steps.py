"""Forward passes: decode steps against reading weights and cache once, prompts against the matrix rate."""

from __future__ import annotations

import statistics
import time

from benchmarks.gpu.machine import Chart, Machine, Table
from benchmarks.gpu.models import LLAMA, QWEN, Served, configured, random_model, served
from vattention.core import Chunk

LAYOUTS = ("per-layer", "sliced")
NUM_STEPS = 10


def decode(machine: Machine) -> Table:
    """All sequences with the same context, both layouts, greedy, by graphs and launched kernel by kernel."""
    batches, context = ((1, 4), 64) if machine.tiny else ((1, 8, 32, 128, 256), 1024)
    rows: list[dict[str, object]] = []
    for shape in (QWEN, LLAMA):
        model = random_model(shape, machine)
        for layout in LAYOUTS:
            config = configured(machine, max_num_seqs=max(batches), kv_layout=layout)
            with served(machine, model, config, context + 2 * NUM_STEPS) as running:
                replayed = {}
                if running.captured is not None:
                    replayed = {batch: step_seconds(machine, running, batch, context) for batch in batches}
                    running.runner.launch_eagerly()
                for batch in batches:
                    launched = step_seconds(machine, running, batch, context)
                    seconds = replayed.get(batch, launched)
                    nbytes = model.step_nbytes + batch * context * running.token_nbytes
                    least = nbytes / machine.copy_nbytes_per_s
                    rows.append(
                        {
                            "model": shape,
                            "layout": layout,
                            "kernel": running.runner.kernels[0],
                            "batch": batch,
                            "step, ms": seconds * 1e3,
                            "without graphs, ms": launched * 1e3,
                            "without ÷ with": launched / replayed[batch] if replayed else None,
                            "tokens/s": batch / seconds,
                            "GB": nbytes / 1e9,
                            "of copy": least / seconds,
                            "without, of copy": least / launched,
                            "graphs": running.captured.num_graphs if running.captured else 0,
                            "graphs, s": running.captured.elapsed_s if running.captured else None,
                            "graphs, MiB": running.captured.nbytes / 2**20 if running.captured else None,
                        }
                    )
        del model, running
    return Table(
        f"Decode step at {context:,} tokens: weights, keys and values at no less than 0.8 of copy bandwidth",
        rows,
        Chart("batch", "of copy", ("model", "layout"), 0.8),
    )


def step_seconds(machine: Machine, running: Served, batch: int, context: int) -> float:
    """Median of some decode steps from `context` tokens on."""
    slots = [begin(machine, running, context, context + NUM_STEPS) for _ in range(batch)]
    samples = []
    for position in range(context, context + NUM_STEPS):
        machine.wait()
        began = time.perf_counter()
        for slot in slots:
            running.manager.ensure(slot, position, position + 1)
        predictions = running.runner.predict([Chunk(slot, position, [1], 1) for slot in slots])
        predictions.likeliest(range(batch))
        machine.wait()
        samples.append(time.perf_counter() - began)
    for slot in slots:
        running.manager.release(slot)
    return statistics.median(samples[2:])


def begin(machine: Machine, running: Served, num_tokens: int, max_tokens: int) -> int:
    """A slot with so many tokens' keys and values, all of them random."""
    slot = running.manager.take((), max_tokens=max_tokens).slot
    running.manager.ensure(slot, 0, num_tokens)
    for run in running.manager.runs(slot, num_tokens):
        run.view(machine.dtype).normal_()
    return slot


def prefill(machine: Machine) -> Table:
    """One prompt in one forward pass."""
    length = 128 if machine.tiny else 16384
    rows: list[dict[str, object]] = []
    for shape in (QWEN, LLAMA):
        model = random_model(shape, machine)
        for kv in ("virtual", "paged"):
            config = configured(machine, max_num_seqs=2, kv=kv, block_size=256)
            with served(machine, model, config, length) as running:
                slot = running.manager.take((), max_tokens=length).slot
                running.manager.ensure(slot, 0, length)
                chunk = Chunk(slot, 0, [token % model.model.config.vocab_size for token in range(length)], 1)

                def forward(running: Served = running, chunk: Chunk = chunk) -> None:
                    running.runner.predict([chunk]).likeliest(range(1))

                seconds = machine.seconds(forward, 3)
                flops = _flops(running, length)
                rows.append(
                    {
                        "model": shape,
                        "manager": kv,
                        "kernel": running.runner.kernels[0],
                        "tokens/s": length / seconds,
                        "TFLOP/s": flops / seconds / 1e12,
                        "of product": flops / seconds / machine.matrix_flops_per_s,
                    }
                )
        del model, running, forward
    return Table(
        f"A prompt of {length:,} tokens: at least 0.65 of the matrix rate",
        rows,
        Chart("model", "of product", ("manager",), 0.65),
    )


def _flops(running: Served, length: int) -> float:
    """Two for each weight of the layers and token, and those of causal attention."""
    scores = sum(s.num_heads * (s.key_dim + s.value_dim) for s in running.parts.cache_specs)
    return float(2 * running.random.num_layer_weights * length + scores * length**2)
