"""Putting decode steps into graphs when a model is loaded, where that can be."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from vattention.errors import OutOfMemoryError, UnsupportedModelError
from vattention.kv.manager import KVManager
from vattention.model.cuda_graphs import Capture
from vattention.model.runner import ModelRunner
from vattention.model.verify import verify

_log = logging.getLogger(__name__)


def capture_decode(model: PreTrainedModel, runner: ModelRunner, kv: KVManager, capture: Capture) -> None:
    """Let decode steps be graphs; where that cannot be, say so and go on without.

    Of the graphs, the one for two sequences of few tokens is verified, or for one where there is one slot.
    The others come from the same code.

    What graphs take is the cache's no more, so its limit is read again.
    """
    if runner.uncapturable is not None:
        _log.info("decode steps are launched kernel by kernel: %s", runner.uncapturable)
        return
    try:
        runner.capture(capture)
        verify(model, runner, kv)
    except (UnsupportedModelError, OutOfMemoryError, torch.OutOfMemoryError) as error:
        runner.launch_eagerly()
        _log.warning("decode steps are launched kernel by kernel, not as CUDA graphs: %s", error)
    kv.refresh_limit()
