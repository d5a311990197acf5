"""From options to the parts an engine runs on: the only place that knows them all."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace

from vattention.config import EngineConfig
from vattention.engine.parts import Parts
from vattention.garbage import loading
from vattention.kv.build import check_page_size, create_manager, create_swap_space
from vattention.model.capture_decode import capture_decode
from vattention.model.cuda_graphs import CudaCapture
from vattention.model.fingerprint import fingerprint
from vattention.model.fused_layer import fuse_layers
from vattention.model.loader import device_named, load
from vattention.model.optimize import optimize
from vattention.model.optimize_report import OptimizeReport
from vattention.model.probe import probe
from vattention.model.rope import fix_rope
from vattention.model.runner import ModelRunner
from vattention.model.verify import verify

_log = logging.getLogger(__name__)


def build(config: EngineConfig) -> Parts:
    """Load, optimise, probe and verify the model, and put a KV cache under it.

    Raises:
        ConfigError, UnsupportedModelError, OutOfMemoryError: as their messages say; nothing is left behind.
    """
    with loading():
        return _build(config)


def _build(config: EngineConfig) -> Parts:
    # What can be refused without the model is, before it is loaded.
    device = str(device_named(config.device))
    check_page_size(config, device)
    swap_space = create_swap_space(config, device)
    loaded = load(config)
    identity = fingerprint(loaded.model)
    if config.quantization is not None:
        # Keys and values are those of other weights.
        identity = f"{identity}-{config.quantization}"
    report = optimize(loaded.model, config.quantization)
    fix_rope(loaded.model, loaded.max_model_len)
    attention = probe(loaded.model)
    fuse_layers(loaded.model, attention)
    replays = loaded.model.device.type == "cuda" and not config.enforce_eager
    with ExitStack() as undo:
        manager = create_manager(
            # Graphs keep a slot for the rows that fill their batches up.
            replace(config, max_num_seqs=config.max_num_seqs + 1) if replays else config,
            attention.cache_specs,
            dtype=loaded.model.dtype,
            device=str(loaded.model.device),
            max_len=loaded.max_model_len,
        )
        undo.callback(manager.close)
        runner = ModelRunner(loaded.model, attention, manager, config.attention)
        undo.callback(runner.close)
        _report(report.with_screen(runner.screen_nbytes), config.quantization)
        verify(loaded.model, runner, manager)
        if replays:
            capture_decode(loaded.model, runner, manager, CudaCapture(loaded.model.device))
        undo.pop_all()
    return Parts(
        name=loaded.name,
        manager=manager,
        runner=runner,
        tokenizer=loaded.tokenizer,
        vocab_size=loaded.hf_config.vocab_size,
        max_model_len=loaded.max_model_len,
        end_token_ids=loaded.generation.eos_token_ids,
        default_sampling=loaded.generation.sampling,
        cache_specs=attention.cache_specs,
        fingerprint=identity,
        swap_space=swap_space,
    )


def _report(report: OptimizeReport, quantization: str | None) -> None:
    _log.info(
        "weights: %.0f MiB%s%s, packed in %.1f s",
        report.nbytes / 2**20,
        f", linear layers in {quantization}" if quantization else "",
        f", {report.screen_nbytes / 2**20:.0f} MiB of it to find likely tokens" if report.screen_nbytes else "",
        report.elapsed_s,
    )
