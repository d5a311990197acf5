"""A forward pass of a plan."""

from __future__ import annotations

import logging
import time

import torch

from vattention.engine.plan import Plan
from vattention.engine.preemption import Swapper
from vattention.kv.manager import KVManager
from vattention.model.predictions import Predictions
from vattention.model.runner import ModelRunner

logger = logging.getLogger(__name__)


class Forward:
    """Runs plans on a model, whose keys and values the manager has memory for.

    Args:
        swapper: learns from the time that prompts take.
    """

    def __init__(self, runner: ModelRunner, manager: KVManager, swapper: Swapper) -> None:
        self._runner = runner
        self._manager = manager
        self._swapper = swapper

    def __call__(self, plan: Plan) -> Predictions:
        begun = time.monotonic()
        for sequence in plan.sequences:
            if sequence.request.metrics.first_scheduled_time is None:
                sequence.request.metrics.first_scheduled_time = begun
        predictions = self._predict(plan)
        self._swapper.forwarded(plan.chunks, time.monotonic() - begun)
        return predictions

    def _predict(self, plan: Plan) -> Predictions:
        """Where the device has too little memory left, once more after the cache has given back what it can do
        without: others may take memory faster than the limit follows.
        """
        try:
            return self._runner.predict(plan.chunks)
        except torch.OutOfMemoryError as error:
            logger.warning("no memory for a forward pass; the KV cache gives warm memory back: %s", error)
        # Not while the error is handled, which holds on to what the first try had computed.
        self._manager.drop_warm()
        self._manager.refresh_limit()
        return self._runner.predict(plan.chunks)
